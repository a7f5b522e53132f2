"""A replayed file worded by models: nothing expires while they work, and the summary has what each tier did."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import orjson
from aiohttp import web

import agents
from agents.demo.viewers import demo_viewers, watches
from agents.event_log import load_event_log
from agents.replay_file import Replayed, replay_events
from agents.settings import Settings
from agents.student_client import ScriptedStudent
from agents.teacher_client import TeacherClient, policy_of, teacher_of
from streams.prompts import Prompt
from tests.request_samples import NOON
from tests.unit.test_teacher_client import serving

VIEWERS, WATCHES = 5, 40


def rows() -> dict[str, list[dict[str, object]]]:
    catalogue = (Path(agents.__file__).parent / "data" / "demo_catalogue.jsonl").read_bytes().splitlines()
    videos: dict[str, list[dict[str, object]]] = {}
    for row in map(orjson.loads, catalogue):
        videos.setdefault(row["topic"], []).append(row)
    return videos


async def replayed(
    student: ScriptedStudent | None, teacher: TeacherClient | None = None, settings: Settings | None = None
) -> Replayed:
    """A few viewers of the demo, days apart from each other."""
    videos, settings = rows(), settings or Settings()
    events = []
    for number, viewer in enumerate(demo_viewers(list(videos), VIEWERS - 2, 0, 7)):
        events += list(islice(watches(viewer, videos, NOON + number * 3 * 86_400_000, 7), WATCHES))
    lines = [orjson.dumps(event) for event in events]
    log = load_event_log(lines, settings)
    return await replay_events(log, [], student=student, teacher=teacher, policy=policy_of(settings))


async def test_no_request_expires_while_a_model_words_others() -> None:
    student = ScriptedStudent(delay_seconds=0.002)
    found = await replayed(student)
    personas = [orjson.loads(line) for line in found.lines["personas.jsonl"]]
    requests = [orjson.loads(line) for line in found.lines["requests.jsonl"]]
    below = {request["request_id"] for request in requests if request["tier_limit"] == "template"}
    above = [persona for persona in personas if persona["request_id"] not in below]
    assert len({persona["user_id"] for persona in above}) == VIEWERS
    assert {persona["tier"] for persona in above} == {"student"}


async def test_without_a_student_there_are_templates_and_the_same_bytes() -> None:
    first, second = await replayed(None), await replayed(None)
    assert first == second
    assert set(first.summary["wording"]) == {"template.texts"}


async def test_the_summary_has_what_each_tier_worded_and_took() -> None:
    def garbage(prompt: Prompt, seed: int) -> str:
        return "garbage"

    async def teach(request: web.Request) -> web.Response:
        asked = orjson.loads(await request.read())["messages"]
        facts = orjson.loads(asked[1]["content"])
        usage = {"prompt_tokens": 300, "completion_tokens": 20}
        if facts["key"] == "s":
            text = f"Mostly watches {facts['interests'][0]}."
        elif "trend" in facts:
            text = f"Keeps up with {facts['label']} on most days."
        else:
            text = f"Might like {facts['label']} after so much {facts['because_of'][0]}."
        answer = orjson.dumps({facts["key"]: text}).decode()
        return web.json_response({"choices": [{"message": {"content": answer}}], "usage": usage})

    async with serving(teach) as endpoint:
        settings = Settings(teacher_url=endpoint.url, teacher_model="big")
        teacher = teacher_of(settings)
        assert teacher is not None
        found = await replayed(ScriptedStudent(garbage), teacher, settings)
        await teacher.close()
    figures = found.summary["wording"]
    assert found.summary["personas_by_tier"]["teacher"] >= VIEWERS
    assert figures["teacher.tokens_in"] == 300 * len(endpoint.asked)
    assert 0 < figures["teacher.texts"] <= len(endpoint.asked)
    assert (figures["student.first_passes"], figures.get("student.texts", 0)) == (0, 0)
    personas = [orjson.loads(line) for line in found.lines["personas.jsonl"]]
    assert sum(persona["model"]["items_teacher"] for persona in personas) >= figures["teacher.texts"]
