"use strict";
// Every text from outside goes through el(), which makes text nodes only: nothing here parses markup.

const POLL_MS = 1000;
const CARD_EVERY_MS = 10000;
const byId = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

function setText(id, text) {
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text;
}

// Replaces the children of a node if what they show has changed, keeping focus and open details.
const shown = new WeakMap();
function replace(node, key, children) {
  if (shown.get(node) === key) return;
  shown.set(node, key);
  const focused = node.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const open = new Set([...node.querySelectorAll("details[open]")].map((details) => details.dataset.key));
  node.replaceChildren(...children());
  for (const item of node.querySelectorAll("[data-key]")) {
    if (open.has(item.dataset.key)) item.open = true;
    if (item.dataset.key === focused) item.focus({ preventScroll: true });
  }
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const number = (value) => (value >= 100 ? whole.format(value) : value.toFixed(value >= 10 || value === 0 ? 0 : 1));
const percent = (share) => `${Math.round(share * 100)}%`;
const words = (name) => name.replaceAll("_", " ");
const date = (ms) => new Date(ms).toISOString().slice(0, 10);
const moment = (ms) => `${date(ms)} ${new Date(ms).toISOString().slice(11, 19)}`;

function ago(ms) {
  const seconds = Math.max(0, Math.round((Date.now() - ms) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return seconds < 86400 ? `${Math.floor(seconds / 3600)} h ago` : date(ms);
}

function svg(tag, points) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  node.setAttribute("points", points.join(" "));
  return node;
}

function bar(share, kind) {
  const fill = el("i");
  fill.style.width = `${Math.min(100, Math.max(0, share * 100)).toFixed(1)}%`;
  return el("span", { class: kind ? `bar ${kind}` : "bar", "aria-hidden": "true" }, fill);
}

// ---- the fleet

function showOverview(overview) {
  const state = byId("state");
  state.classList.toggle("problem", overview.problem !== null);
  setText("state", overview.problem || `Live, ${moment(overview.at)} UTC`);
  setText("arriving", number(overview.arriving));
  setText("events-note", `${number(overview.applied)} per second applied, ${whole.format(overview.events)} in all`);
  setText("waiting", whole.format(overview.groups.reduce((sum, group) => sum + group.lag, 0)));
  setText("delay", overview.delay_p50 === null ? "–" : overview.delay_p50.toFixed(1));
  setText("delay-note", overview.delay_p95 === null ? "none yet" : `95% within ${overview.delay_p95.toFixed(1)} s`);
  showSpark(overview.history);
  replace(byId("groups"), JSON.stringify(overview.groups), () => overview.groups.map((group) =>
    el("div", null, el("dt", null, group.group), el("dd", null, whole.format(group.lag)))));
  showBars("rules", overview.rules, `None in the last ${overview.window_minutes} minutes.`);
  showBars("tiers", overview.tiers, `None in the last ${overview.window_minutes} minutes.`);
  const notes = [`Last ${overview.window_minutes} minutes.`];
  if (overview.removed) notes.push(`${whole.format(overview.removed)} removed at the viewer's wish.`);
  if (overview.unreadable) notes.push(`${whole.format(overview.unreadable)} unreadable records.`);
  setText("removed", notes.join(" "));
}

function showBars(id, counts, none) {
  const most = Math.max(1, ...counts.map((item) => item.count));
  replace(byId(id), JSON.stringify(counts), () => counts.length
    ? counts.map((item) => el("li", null,
      el("span", null, words(item.name)), bar(item.count / most), el("span", { class: "number" }, whole.format(item.count))))
    : [el("li", { class: "note" }, none)]);
}

function showSpark(history) {
  const spark = byId("spark");
  if (history.length < 2) return spark.replaceChildren();
  const most = Math.max(1, ...history);
  const points = history.map((value, i) => `${(100 * i) / (history.length - 1)},${23 - (22 * value) / most}`);
  return spark.replaceChildren(svg("polygon", ["0,24", ...points, "100,24"]), svg("polyline", points));
}

function showLatest(personas) {
  // The time is part of the key, so that "5 min ago" stays true.
  const key = JSON.stringify([personas, viewer, Math.floor(Date.now() / 10000)]);
  replace(byId("latest"), key, () => personas.length
    ? personas.map((persona) => {
      const button = el("button", {
        type: "button",
        "data-key": `${persona.user_id}/${persona.version}`,
        "aria-pressed": String(persona.user_id === viewer),
      },
      el("span", { class: "who" }, el("b", null, persona.user_id), el("small", null, ago(persona.at))),
      el("span", { class: "words" }, persona.summary),
      el("small", null, `${words(persona.rule)} · ${persona.tier} · ${persona.maturity}`));
      button.addEventListener("click", () => choose(persona.user_id));
      return el("li", null, button);
    })
    : [el("li", { class: "note" }, "None yet. Personas appear here once viewers have watched enough.")]);
}

// ---- one viewer

function showCard(card) {
  replace(byId("persona"), JSON.stringify(card), () => cardNodes(card));
}

function cardNodes({ persona, titles, labels, versions, why }) {
  const nodes = [
    el("h3", { class: "name" }, persona.user_id),
    el("p", { class: "note" },
      `${persona.maturity} · ${whole.format(persona.basis.events)} watches, ${date(persona.basis.first_ts)} to ${date(persona.basis.last_ts)}`),
    el("p", { class: "summary", lang: persona.language }, persona.summary),
    el("h3", null, "Interests"),
    el("ul", { class: "interests" }, ...persona.interests.map((interest) => interestNode(interest, titles))),
  ];
  if (persona.novel.length) {
    nodes.push(el("h3", null, "Might like next"), el("ul", { class: "novel" }, ...persona.novel.map((topic) =>
      el("li", null, el("b", null, topic.label), " ", viaNode(topic, labels), el("p", null, topic.reason)))));
  }
  if (persona.avoid.length) {
    const avoided = persona.avoid.map((cluster) => labels[cluster] || `cluster ${cluster}`);
    nodes.push(el("h3", null, "Avoids"), el("p", null, avoided.join(", ")));
  }
  if (persona.explanation) nodes.push(el("h3", null, "Why it was refreshed"), ...whyNodes(persona.explanation, why));
  nodes.push(el("h3", null, "Versions"), el("ol", { class: "versions" }, ...versions.map(versionNode)));
  nodes.push(el("h3", null, "Worded by"), el("p", { class: "note" }, modelText(persona)));
  return nodes;
}

function viaNode(topic, labels) {
  const via = topic.via.map((cluster) => labels[cluster]).filter(Boolean);
  return el("small", null, via.length ? `through ${via.join(", ")}` : "");
}

const TRENDS = { "1": ["↑ rising", "rising"], "0": ["→ steady", ""], "-1": ["↓ falling", "falling"] };

function interestNode(interest, titles) {
  const [trend, kind] = TRENDS[interest.trend] || TRENDS["0"];
  const node = el("li", null,
    el("div", { class: "interest" },
      el("span", null, el("b", null, interest.label), interest.pinned ? el("small", null, " pinned") : ""),
      bar(interest.share), el("span", { class: "number" }, percent(interest.share)), el("small", { class: kind }, trend)),
    el("p", null, interest.description));
  if (interest.evidence.length) {
    node.append(el("ul", { class: "evidence", "aria-label": "Watched" }, ...interest.evidence.map((watch) =>
      el("li", null, el("span", null, titles[watch.video_id] || "(no title)"),
        el("small", null, `${watch.video_id} · ${date(watch.ts)}`)))));
  }
  return node;
}

function whyNodes(explanation, why) {
  const { reason } = why;
  const nodes = [
    el("p", null, reason.headline),
    el("p", { class: "note" },
      `Rule ${words(explanation.rule)}, ${whole.format(explanation.watches_since)} watches since the last request.`),
  ];
  if (reason.measure) {
    nodes.push(scaleNode(reason.measure, explanation.value, explanation.threshold, "threshold", reason.end, reason.meaning));
  }
  if (explanation.divergence !== null) {
    nodes.push(scaleNode(why.divergence, explanation.divergence, explanation.divergence_null, "chance", why.divergence_end, why.chance));
  }
  for (const [title, rows, kind] of [["Risen", explanation.risen, "rising"], ["Fallen", explanation.fallen, "falling"]]) {
    if (rows.length) nodes.push(el("h4", null, title), el("ul", { class: "moved" }, ...rows.map((row) => movedNode(row, kind))));
  }
  return nodes;
}

// A value on a scale with a mark; the text says the same numbers, so the drawing is hidden from screen readers.
function scaleNode(measure, value, mark, name, end, meaning) {
  const drawn = el("div", { class: "scale", "aria-hidden": "true" }, bar(value / end));
  if (mark !== null) {
    const place = `${Math.min(100, Math.max(0, (mark / end) * 100)).toFixed(1)}%`;
    const label = el("small", null, `${name} ${mark.toFixed(3)}`);
    label.style.transform = `translateX(-${place})`; // inside the scale wherever the mark is
    const line = el("b", null, label);
    line.style.left = place;
    drawn.append(line);
  }
  return el("div", { class: "measure" }, el("p", null, measure), drawn, meaning ? el("p", { class: "note" }, meaning) : "");
}

function movedNode([, label, before, now], kind) {
  const row = (name, share, barKind) => el("div", null,
    el("small", null, name), bar(share, barKind), el("span", { class: "number" }, percent(share)));
  return el("li", { class: kind }, el("span", null, label), row("before", before, "before"), row("now", now));
}

function versionNode(version) {
  const changes = [["added", version.added], ["left", version.removed], ["reworded", version.reworded]]
    .filter(([, labels]) => labels.length).map(([verb, labels]) => `${verb} ${labels.join(", ")}`);
  return el("li", null,
    el("div", null, `${version.version} · ${version.tier} · ${words(version.rule)} · ${moment(version.generated_at)}`),
    changes.length ? el("div", { class: "note" }, changes.join("; ")) : "",
    el("details", { "data-key": `v${version.version}` }, el("summary", null, "Its words"), el("p", null, version.summary)));
}

function modelText(persona) {
  const { model } = persona;
  const cost = persona.cached ? "all wording from the cache"
    : `${model.tokens_in} tokens in, ${model.tokens_out} out, ${(model.latency_ms / 1000).toFixed(1)} s`;
  return `${persona.tier}: ${model.name} ${model.version}, ${cost}; registry ${persona.registry_version}, request ${persona.request_id}`;
}

// ---- which viewer, and polling

let viewer = null;
let cardAt = 0;
let cardVersion = null;

function choose(user) {
  location.hash = new URLSearchParams({ viewer: user }).toString();
  // On a narrow screen the card stands above the list.
  if (byId("card").getBoundingClientRect().bottom < 0) byId("card").scrollIntoView();
}

function followHash() {
  viewer = new URLSearchParams(location.hash.slice(1)).get("viewer");
  cardAt = 0;
  if (viewer !== null) byId("user").value = viewer;
  poll();
}

async function getJson(path) {
  const response = await fetch(path);
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.error), { answered: true });
  return body;
}

async function refreshCard(personas) {
  if (viewer === null) {
    replace(byId("persona"), "", () => [el("p", { class: "absent" }, "Choose a viewer from the list, or give an id.")]);
    return;
  }
  const asked = viewer;
  const newest = personas.find((persona) => persona.user_id === asked);
  const fresh = Date.now() - cardAt < CARD_EVERY_MS && (!newest || newest.version === cardVersion);
  if (fresh) return;
  try {
    const card = await getJson(`/api/viewers?${new URLSearchParams({ user_id: asked })}`);
    if (asked !== viewer) return;
    cardVersion = card.persona.version;
    showCard(card);
  } catch (error) {
    if (!error.answered) throw error;
    const text = `${asked}: ${error.message}`;
    replace(byId("persona"), text, () => [el("p", { class: "absent" }, text)]);
  }
  cardAt = Date.now();
}

let polling = false;
async function poll() {
  if (polling || document.hidden) return;
  polling = true;
  try {
    const [overview, personas] = await Promise.all([getJson("/api/overview"), getJson("/api/latest")]);
    showOverview(overview);
    showLatest(personas);
    await refreshCard(personas);
  } catch (error) {
    console.error(error);
    byId("state").classList.add("problem");
    setText("state", "The worker does not answer. What is shown is the last it said.");
  } finally {
    polling = false;
  }
}

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  choose(byId("user").value.trim());
});
addEventListener("hashchange", followHash);
document.addEventListener("visibilitychange", poll);
followHash();
setInterval(poll, POLL_MS);
