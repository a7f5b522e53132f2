"""Personas for the terminal. Every text from outside is shown as text: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from unicodedata import category

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agents.explanations import CHANCE, divergence_measure, reason_of, scale_end
from streams.records import Explanation, Persona, PersonaInterest, PersonaNovel

BAR_WIDTH: Final = 20
CHART_WIDTH: Final = 60
WIDE: Final = 90
"""Columns from which a line of `why_table` says all."""
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_MARK: Final = "┃"
_TRENDS: Final = {1: ("↑ rising", "green"), 0: ("→ steady", "dim"), -1: ("↓ falling", "red")}
_HIDDEN: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Control, format (bidirectional overrides among them), surrogate, private and line-separating characters."""

TitleOf = Callable[[str], str | None]
LabelOf = Callable[[int], str | None]


def visible(text: str) -> str:
    """`text` with everything that could drive or disguise a terminal's output replaced by U+FFFD."""
    if text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if category(char) in _HIDDEN else char for char in text)


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of `width` characters, filled to `share` (0..1, clamped) in steps of an eighth of one."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def day(ms: int) -> str:
    """Date of a time in milliseconds, UTC."""
    return _moment(ms, "%Y-%m-%d")


def moment(ms: int) -> str:
    """Date and time of a time in milliseconds, UTC."""
    return _moment(ms, "%Y-%m-%d %H:%M:%S")


def _moment(ms: int, form: str) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):  # beyond the years that a date can have
        return str(ms)


def persona_card(persona: Persona, title_of: TitleOf, label_of: LabelOf) -> RenderableType:
    """Everything a persona says, for reading: summary, interests with evidence, novel topics, basis, origin.

    title_of gives a video's title, label_of a cluster's label, None where unknown.
    """
    own = {interest.cluster_id: interest.label for interest in persona.interests}

    def label(cluster: int) -> str:
        return own.get(cluster) or label_of(cluster) or f"cluster {cluster}"

    parts: list[RenderableType] = [
        _headline(persona),
        Padding(Text(visible(persona.summary)), (1, 2, 0, 2)),
        _section("Interests"),
        *(_interest(interest, title_of) for interest in persona.interests),
    ]
    if not persona.interests:
        parts.append(_indented(Text("none yet", "dim")))
    if persona.novel:
        parts += [_section("Might like next"), *(_novel(topic, label) for topic in persona.novel)]
    if persona.avoid:
        parts += [_section("Avoids"), _indented(Text(visible(", ".join(map(label, persona.avoid)))))]
    return Group(*parts, _section("Where it comes from"), _indented(_origin(persona)))


def _headline(persona: Persona) -> Text:
    return Text.assemble(
        (visible(persona.user_id), "bold"),
        (
            f"  {persona.maturity}, {persona.tier}, version {persona.version}, {moment(persona.generated_at)}",
            "dim",
        ),
    )


def _section(title: str) -> RenderableType:
    return Padding(Text(title, "bold cyan"), (1, 0, 0, 0))


def _indented(item: RenderableType) -> Padding:
    return Padding(item, (0, 0, 0, 2))


def _interest(interest: PersonaInterest, title_of: TitleOf) -> RenderableType:
    trend, style = _TRENDS.get(interest.trend, _TRENDS[0])
    row = Table.grid(padding=(0, 2), expand=False)
    row.add_column(width=28, overflow="fold")
    row.add_column(no_wrap=True)
    row.add_column(justify="right", width=4)
    row.add_column(width=9)
    row.add_column()
    row.add_row(
        Text(visible(interest.label), "bold"),
        Text(bar(interest.share), "cyan"),
        Text(f"{interest.share:.0%}"),
        Text(trend, style),
        Text(f"{interest.horizon} term{', pinned' if interest.pinned else ''}", "dim"),
    )
    lines = [Text(visible(interest.description)), *_evidence(interest, title_of)]
    return _indented(Group(row, *(Padding(line, (0, 0, 0, 2)) for line in lines)))


def _evidence(interest: PersonaInterest, title_of: TitleOf) -> Iterator[Text]:
    for watch in interest.evidence:
        title = title_of(watch.video_id)
        yield Text.assemble(
            (f"{day(watch.ts)}  ", "dim"),
            visible(title) if title else "(no title)",
            (f"  {visible(watch.video_id)}", "dim"),
        )


def _novel(topic: PersonaNovel, label: Callable[[int], str]) -> RenderableType:
    via = ", ".join(map(label, topic.via))
    head = Text.assemble((visible(topic.label), "bold"), (f"  through {visible(via)}" if via else "", "dim"))
    return _indented(Group(head, Padding(Text(visible(topic.reason)), (0, 0, 0, 2))))


def _origin(persona: Persona) -> RenderableType:
    basis, model = persona.basis, persona.model
    cost = f"{model.tokens_in} tokens in, {model.tokens_out} out, {model.latency_ms / 1000:.1f} s"
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim")
    rows.add_column(overflow="fold")
    rows.add_row("rule", Text(_words(persona.rule)))
    rows.add_row(
        "basis",
        Text(
            f"{basis.events} watches, {day(basis.first_ts)} to {day(basis.last_ts)}, effective sample {basis.n_eff:.1f}"
        ),
    )
    rows.add_row("tier", Text(str(persona.tier)))
    rows.add_row(
        "model",
        Text(visible(f"{model.name} {model.version}, {'all from the cache' if persona.cached else cost}")),
    )
    rows.add_row("version", Text(f"{persona.version} after {persona.previous_version or 'none'}"))
    rows.add_row("request", Text(visible(persona.request_id)))
    rows.add_row("registry", Text(str(persona.registry_version)))
    return rows


def history_table(personas: Sequence[Persona]) -> RenderableType:
    """Stored versions, newest first, with what changed in each; changes of interests by their labels."""
    names = {interest.interest_id: interest.label for persona in personas for interest in persona.interests}
    table = Table(box=None, pad_edge=False, title=None, header_style="dim")
    for column in ("version", "written", "tier", "rule", "changes", "summary"):
        table.add_column(column, overflow="fold")
    for persona in personas:
        changes = [
            f"{sign}{names.get(interest, interest)}"
            for sign, ids in (
                ("+", persona.changes.added),
                ("-", persona.changes.removed),
                ("~", persona.changes.reworded),
            )
            for interest in ids
        ]
        table.add_row(
            Text(str(persona.version)),
            Text(moment(persona.generated_at)),
            Text(str(persona.tier)),
            Text(_words(persona.rule)),
            Text(visible(", ".join(changes))),
            Text(visible(persona.summary)),
        )
    return Group(_section("Versions"), _indented(table))


def why_card(user_id: str, version: int, explanation: Explanation) -> RenderableType:
    """Why a refresh was asked for, as a chart: the rule's value against its threshold, the divergence against chance,
    and each interest that rose or fell, before and now. Fits the width there is; nothing is said by colour alone.
    """
    reason, divergence = reason_of(explanation), divergence_measure(explanation)
    since = f"{explanation.watches_since} watches since the last request"
    parts: list[RenderableType] = [
        Text.assemble(
            (visible(user_id), "bold"), (f"  version {version}, rule {_words(explanation.rule)}, {since}", "dim")
        ),
        Padding(Text(reason.headline), (1, 0, 0, 2)),
    ]
    if reason.measure:
        scale = _Scale(explanation.value, explanation.threshold, "threshold", reason.end)
        parts += [_section(_sentence(reason.measure)), _indented(scale), _note(reason.meaning)]
    if explanation.divergence is not None:
        mark = explanation.divergence_null
        scale = _Scale(explanation.divergence, mark, "chance", scale_end(explanation.divergence, mark))
        parts += [_section(_sentence(divergence)), _indented(scale), _note(CHANCE if mark is not None else "")]
    moved = (*explanation.risen, *explanation.fallen)
    most = max((share for _, _, *shares in moved for share in shares), default=0.0)
    for title, rows, style in (("Risen", explanation.risen, "green"), ("Fallen", explanation.fallen, "red")):
        if rows:
            parts += [_section(title), *(_indented(_Moved(*row[1:], most or 1.0, style)) for row in rows)]
    return Group(*(part for part in parts if part))


def why_table(personas: Sequence[Persona]) -> RenderableType:
    """One line for each version, newest first: its rule, and its divergence against chance, all on one scale."""
    return Group(_section("Refreshes"), _indented(_WhyTable(tuple(personas))))


@dataclass(frozen=True, slots=True)
class _WhyTable:
    personas: tuple[Persona, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        width = BAR_WIDTH if wide else BAR_WIDTH // 2
        known = [persona.explanation for persona in self.personas if persona.explanation is not None]
        end = max((scale_end(why.divergence or 0.0, why.divergence_null) for why in known), default=1.0)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("version", *(("written",) if wide else ()), "rule", *(("why",) if wide else ())):
            table.add_column(heading, no_wrap=True)
        table.add_column(f"bits, {_MARK} chance", no_wrap=True)
        for persona in self.personas:
            why = persona.explanation
            measure = reason_of(why).measure if why is not None else "not stored"
            cells = (
                str(persona.version),
                day(persona.generated_at),
                _words(persona.rule),
                measure,
                _bits(why, end, width),
            )
            table.add_row(*(Text(cell) for cell in (cells if wide else cells[::2])))
        yield table


def _bits(why: Explanation | None, end: float, width: int) -> str:
    if why is None or why.divergence is None:
        return ""
    return f"{scale(why.divergence, why.divergence_null, end, width)} {why.divergence:.3f}"


def scale(value: float, mark: float | None, end: float, width: int) -> str:
    """A bar from 0 to `end`, filled to `value`, with a line at `mark`."""
    drawn = bar(value / end, width)
    if mark is None:
        return drawn
    place = _place(mark, end, width)
    return drawn[:place] + _MARK + drawn[place + 1 :]


def _place(mark: float, end: float, width: int) -> int:
    return max(0, min(width - 1, round(mark / end * width)))


@dataclass(frozen=True, slots=True)
class _Scale:
    """A value on a scale, with the name and number of its mark below."""

    value: float
    mark: float | None
    name: str
    end: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(CHART_WIDTH, options.max_width)
        yield Text(scale(self.value, self.mark, self.end, width), "cyan", no_wrap=True)
        if self.mark is None:
            return
        place, name = _place(self.mark, self.end, width), f"{self.name} {self.mark:.3f}"
        fits = place + 2 + len(name) <= width
        yield Text(" " * place + f"↑ {name}" if fits else f"{name} ↑".rjust(place + 1), no_wrap=True, overflow="crop")


@dataclass(frozen=True, slots=True)
class _Moved:
    """One interest's share before and now, as two bars on the scale of the largest share shown."""

    label: str
    before: float
    now: float
    most: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, min(CHART_WIDTH, options.max_width) - len("before  100%"))
        yield Text(visible(self.label), "bold")
        for name, share, style in (("before", self.before, "dim"), ("now   ", self.now, self.style)):
            drawn = Text(bar(share / self.most, width), style)
            yield Text.assemble((f"{name} ", "dim"), drawn, f"{share:>5.0%}", no_wrap=True)


def _note(text: str) -> RenderableType:
    return _indented(Text(text, "dim")) if text else ""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def persona_line(persona: Persona) -> Text:
    """One published persona on one line."""
    return Text.assemble(
        (f"{moment(persona.generated_at)}  ", "dim"),
        (visible(persona.user_id), "bold"),
        (f"  {persona.tier}, {_words(persona.rule)}, version {persona.version}  ", "dim"),
        visible(persona.summary),
    )


def removal_line(user_id: str, at: int, reason: str) -> Text:
    """One tombstone on one line. at: append time, ms."""
    return Text.assemble(
        (f"{moment(at)}  ", "dim"), (visible(user_id), "bold"), ("  removed", "red"), f" ({visible(reason)})"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")
