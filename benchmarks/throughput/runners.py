"""Who is compared, and one run of each: start, progress until all events are done, end, and what it left in Kafka."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson

from agents.kafka_admin import prefixed
from agents.settings import Settings
from agents.topic_reader import TopicReader
from benchmarks.throughput.broker import Broker, CommittedOffsets, Progress, produce_lines
from benchmarks.throughput.event_log import Shape, cached_log, cluster_of_video
from benchmarks.throughput.figures import NotMeasuredError, Rate, Sample, rate
from benchmarks.throughput.processes import LAST_WORDS, Measured, start, start_worker
from benchmarks.throughput.profiled import BEGIN
from benchmarks.throughput.segments import LogContent, topic_content
from streams import topics
from streams.state import from_values

PEERS: Final = Path(__file__).parent / "peers"
SAMPLE_SECONDS: Final = 0.05
STALL_SECONDS: Final = 120.0
"""Without progress for so long a run has failed; quixstreams compacts and bytewax snapshots for seconds at a time."""
SMALL: Final = 10_000
LARGE: Final = 1_000_000


@dataclass(frozen=True)
class Runner:
    """program: a file of peers/, empty for the product. first: only the log's first events, for programs too slow to
    read it whole. commits: whether progress is what it commits to Kafka; else it prints marks.
    """

    name: str
    title: str
    durability: str
    users: int = SMALL
    program: str = ""
    own_environment: bool = False
    first: bool = False
    commits: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    changelog: str = ""


NOTHING: Final = "**none: no state**"
FAUST_CHANGELOG: Final = "{group}-interests-changelog"
RUNNERS: Final = (
    Runner("ours", "ours, whole batches", "changelog, transactional, then offsets"),
    Runner("ours_1m", "ours, whole batches, 1M viewers", "changelog, transactional, then offsets", users=LARGE),
    Runner(
        "ours_plain_agent",
        "ours, plain Faust agent",
        "changelog, transactional, then offsets",
        first=True,
        settings={"intake": "agent"},
    ),
    Runner(
        "faust_naive",
        "Faust: Record, dict Table, an event at a time",
        "changelog, at least once; a failed write is only logged",
        program="faust_naive.py",
        first=True,
        changelog=FAUST_CHANGELOG,
    ),
    Runner(
        "faust_take",
        "Faust: `take(1000)`, orjson",
        "changelog, at least once; a failed write is only logged",
        program="faust_take.py",
        first=True,
        changelog=FAUST_CHANGELOG,
    ),
    Runner(
        "quixstreams",
        "quixstreams State",
        "changelog and RocksDB, checkpoint every 5 s, at least once",
        program="quix.py",
        own_environment=True,
        changelog="changelog__{group}--{topic}--default",
    ),
    Runner(
        "quixstreams_1m",
        "quixstreams State, 1M viewers",
        "changelog and RocksDB, checkpoint every 5 s, at least once",
        users=LARGE,
        program="quix.py",
        own_environment=True,
        changelog="changelog__{group}--{topic}--default",
    ),
    Runner(
        "bytewax",
        "bytewax `stateful_map`, recovery store",
        "SQLite on this machine, snapshot every 10 s; **nothing in Kafka**",
        program="wax.py",
        own_environment=True,
        commits=False,
    ),
    Runner(
        "confluent",
        "confluent-kafka `consume(1000)`, orjson",
        NOTHING,
        program="confluent_loop.py",
        commits=False,
    ),
    Runner("aiokafka", "aiokafka `getmany`, orjson, numpy", NOTHING, program="aiokafka_loop.py", commits=False),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Events of the log for 10k and 1M viewers, and of its beginning that slow programs read."""

    small: int = 1_000_000
    large: int = 1_500_000
    first: int = 100_000

    def shape(self, runner: Runner, seed: int) -> Shape:
        return Shape(runner.users, self.small if runner.users == SMALL else self.large, seed)

    def events(self, runner: Runner) -> int:
        whole = self.small if runner.users == SMALL else self.large
        return min(self.first, whole) if runner.first else whole


@dataclass(frozen=True, slots=True)
class Run:
    """One run's figures. changelog: None where there is none in Kafka; counted: events in its state at the end, all of
    them; None if that was not looked at; requests: refresh requests made, None where a program makes none.
    """

    rate: Rate
    start_seconds: float
    changelog: LogContent | None
    events: int
    counted: int | None
    requests: int | None = None


class FailedRunError(RuntimeError):
    """A run that gives no figure; the message says why, and where its log is."""


class Bench:
    """A broker with the logs, and the environments of those who read them."""

    def __init__(
        self,
        broker: Broker,
        data_folder: Path,
        sizes: Sizes,
        seed: int,
        progress: Progress,
        worker: Mapping[str, Any],
    ) -> None:
        """worker: settings of the product's worker that differ from its defaults."""
        self._broker = broker
        self._folder = data_folder.absolute() / "benchmarks"
        self._sizes = sizes
        self._seed = seed
        self._progress = progress
        self._worker = worker
        self._runs = 0
        self._shared: dict[tuple[int, int], str] = {}
        self._clusters = broker.folder / "clusters.json"
        self._clusters.write_bytes(orjson.dumps(cluster_of_video()))

    def run(
        self,
        runner: Runner,
        *,
        check: bool,
        profile: Path | None = None,
        after: Callable[[Settings], None] | None = None,
    ) -> Run:
        """One run. check: also count what its state holds at the end; after: what to do with what the product's worker
        left, under its settings. Raises FailedRunError.
        """
        self._runs += 1
        name = f"run{self._runs}-{runner.name}-"
        run = _Running(self._broker, runner, self._sizes.events(runner), name, self._progress)
        try:
            with ExitStack() as cleanup:
                if runner.program:
                    run.topic = self._shared_topic(runner)
                    run.group = f"{name}group"
                    process = start(self._peer(runner, run), run.log)
                else:
                    settings = self._broker.create_topics(name)
                    run.topic = prefixed(settings, topics.WATCH_EVENTS)
                    run.group = prefixed(settings, topics.WATCH_APP)
                    self._produce(runner, run.topic)
                    states = self._broker.folder / "states" / name
                    settings = replace(settings, state_folder=states, **self._worker, **runner.settings)
                    process = start_worker(settings, run.log, profile=profile)
                cleanup.callback(process.end)
                begun = None if profile is None else lambda: process.process.send_signal(BEGIN)
                watched = run.watched(process, check=check, begun=begun)
                if after is not None:
                    after(settings)
                return watched
        except (RuntimeError, TimeoutError) as error:
            kept = self._folder / f"failed-{runner.name}.log"
            if run.log.exists():
                shutil.copy(run.log, kept)
            what, *_ = str(error).splitlines()
            raise FailedRunError(f"{what} (its log: {kept})") from error
        finally:
            self._broker.delete_topics(name)

    def _shared_topic(self, runner: Runner) -> str:
        """The peers' topic with this log, or with its beginning."""
        key = (runner.users, self._sizes.events(runner))
        if key not in self._shared:
            name = f"peers-{key[0]}-{key[1]}"
            self._broker.create_topic(name, 4, {"message.timestamp.type": "LogAppendTime", "retention.ms": "-1"})
            self._produce(runner, name)
            self._shared[key] = name
        return self._shared[key]

    def _produce(self, runner: Runner, topic: str) -> None:
        self._progress(f"{runner.name}: writing its events")
        path = cached_log(self._sizes.shape(runner, self._seed), self._folder / "logs")
        produce_lines(self._broker.settings, topic, path, self._sizes.events(runner))

    def _peer(self, runner: Runner, run: _Running) -> list[str]:
        python = peer_python(self._folder.parent / "bench-venv", self._progress) if runner.own_environment else None
        folder = self._broker.folder / "peers" / run.group
        folder.mkdir(parents=True)
        return [
            str(python or sys.executable),
            str(PEERS / runner.program),
            f"--bootstrap={self._broker.settings.kafka_bootstrap}",
            f"--topic={run.topic}",
            f"--group={run.group}",
            f"--clusters={self._clusters}",
            f"--folder={folder}",
            f"--events={run.events}",
        ]


@dataclass
class _Running:
    """A run under way."""

    broker: Broker
    runner: Runner
    events: int
    name: str
    progress: Progress
    topic: str = ""
    group: str = ""

    @property
    def log(self) -> Path:
        return self.broker.folder / "logs" / f"{self.name}.log"

    def watched(self, process: Measured, *, check: bool, begun: Callable[[], None] | None = None) -> Run:
        """Watch it to the end of its events; calls `begun` at the first progress."""
        started = time.monotonic()
        if self.runner.commits:
            with CommittedOffsets(self.broker.settings, self.group, self.topic) as committed:
                samples = self._samples(process, committed.total, begun)
        else:
            samples = self._samples(process, lambda: process.marks, begun)
        first = next(sample.at for sample in samples if sample.done)
        measured = rate(samples, self.events)
        process.end()
        changelog = self._changelog()
        content = topic_content(self.broker.log_folder, changelog) if changelog else None
        counted = self._counted(changelog) if check and changelog else None
        requests = None
        if not self.runner.program:
            requests = topic_content(self.broker.log_folder, self.name + topics.REFRESH_REQUESTS).records
        if not changelog:
            counted = process.marks  # such a program has no state that others could read
        if counted is not None and counted != self.events:
            raise NotMeasuredError(f"counted {counted:,} of {self.events:,} events\n{process.text()[-LAST_WORDS:]}")
        return Run(measured, first - started, content, self.events, counted, requests)

    def _samples(self, process: Measured, done: Callable[[], int], begun: Callable[[], None] | None) -> list[Sample]:
        samples: list[Sample] = [Sample(time.monotonic(), 0, 0.0)]
        changed = told = time.monotonic()
        while samples[-1].done < self.events:
            time.sleep(SAMPLE_SECONDS)
            if self.runner.commits:  # a stateless loop ends by itself
                process.check()
            now_done = done()
            now = time.monotonic()
            if now_done > samples[-1].done:
                changed = now
                if begun is not None and samples[-1].done == 0:
                    begun()
            elif now - changed > STALL_SECONDS:
                raise TimeoutError(f"no progress for {STALL_SECONDS:.0f} s at {now_done:,} of {self.events:,} events")
            cpu = process.cpu_seconds() if process.running else samples[-1].cpu
            samples.append(Sample(now, now_done, cpu))
            if now - told > 5:
                told = now
                self.progress(f"{self.runner.name}: {now_done:,} of {self.events:,} events")
        return samples

    def _changelog(self) -> str:
        if not self.runner.program:
            return self.name + topics.INTERESTS_CHANGELOG
        return self.runner.changelog.format(group=self.group, topic=self.topic)

    def _counted(self, changelog: str) -> int:
        with TopicReader(self.broker.settings) as reader:
            latest = {message.key(): message.value() for message in reader.read(changelog)}
        values = [value for value in latest.values() if value is not None]
        if self.runner.program:  # Faust and quixstreams keep the state as JSON
            return sum(int(orjson.loads(value)["events"]) for value in values)
        return sum(int(from_values(part)["events"].sum()) for part in batched(values, 10_000))


def batched(values: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    """Parts of at most `size`."""
    return (values[start : start + size] for start in range(0, len(values), size))


def peer_python(folder: Path, progress: Progress) -> Path:
    """Python of the environment for peers whose packages the product does not have; made on first use, from a lock."""
    lock = PEERS / "requirements.lock"
    stamp = folder / "stamp.lock"
    python = folder / "bin" / "python"
    if stamp.exists() and stamp.read_bytes() == lock.read_bytes():
        return python
    progress("installing the peers' packages")
    venv.create(folder, with_pip=True, clear=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    done = subprocess.run(
        [str(python), *install, "--only-binary=:all:", "-r", str(lock)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the peers' packages cannot be installed into {folder}:\n{done.stderr[-2000:]}")
    stamp.write_bytes(lock.read_bytes())
    return python


def settings_for_benchmarks() -> Settings:
    """The product's defaults: what a user's own environment sets must not decide a benchmark."""
    return Settings()
