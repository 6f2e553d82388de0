"""Ask from its options to its summary: questions about stored vectors, answered by an oracle, in one table."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from nla_engine.config import AskOptions
from nla_engine.engine.generator import Watch
from nla_engine.errors import RequestError
from nla_engine.models.injection import Prompt
from nla_engine.models.load import tokenizer_of
from nla_engine.ops.sampling import sampling_of
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.roundtrip.background import Background
from nla_engine.roundtrip.oracle import Prompts, find_oracle, load_writer
from nla_engine.roundtrip.pair import announce_unfused, compute_with
from nla_engine.roundtrip.pipeline import CHUNK, COMMIT_SECONDS
from nla_engine.roundtrip.questions import Questions
from nla_engine.roundtrip.results import ANSWERS, ResultTable, check_table
from nla_engine.roundtrip.rows import row_columns
from nla_engine.roundtrip.summary import ASKING, LOADING, PREPARING, AskSummary, summarise_answers
from nla_engine.roundtrip.texts import DRAW_OPTIONS, READ_AHEAD, read_ahead, without_direction
from nla_engine.roundtrip.writer import Asked, Limits, Writer
from nla_engine.sites import Site, listed
from nla_engine.store import CaptureStore, LayerReader


@dataclass(frozen=True)
class Answer:
    """What the oracle answered to a prompt, by the prompt's number.

    status: ok (it ended its reply), unclosed (cut by the length limit), or that of a vector without a direction
    """

    prompt: int
    sample: int
    text: str
    status: str
    n_tokens: int


def run_ask(
    options: AskOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
) -> AskSummary:
    """Ask, and write the table. Raises the errors of `nla_engine.errors`."""
    if options.dry_run:
        raise RequestError("--dry-run writes nothing: call `nla_engine.roundtrip.ask_estimate.estimate_ask`")
    phases = Phases(progress)
    run = prepare_ask(options, announce, phases)
    table = ResultTable.open(
        options.out,
        options=run.identity(),
        resume=options.resume,
        overwrite=options.overwrite,
        schema=ANSWERS,
    )
    before = table.done
    with table:
        if not table.finished:
            run.fill(table, announce, phases)
    return summarise_answers(options, phases.seconds(), table.done - before)


def prepare_ask(options: AskOptions, announce: Announce, phases: Phases) -> AskRun:
    """Load the oracle and check everything; nothing is written. Errors as for `run_ask`."""
    phases.phase(LOADING)
    store = CaptureStore.open(options.store)
    check_table(options.out, resume=options.resume, overwrite=options.overwrite)
    layer = _layer(store, options)
    questions = Questions.of(store, options)
    device, dtype, kernels = compute_with(options, announce)
    source = find_oracle(options)
    prompts = Prompts(options, layer.layer, tokenizer_of(source, remote_code=options.trust_remote_code))
    limits, fingerprint = prompts.survey(questions.kinds())  # before the weights are read, which takes longer
    writer = load_writer(options, source, device, dtype, kernels)
    announce_unfused(writer.lm, kernels, device, announce)
    if writer.lm.d_model != store.d_model:
        raise RequestError(
            f"--oracle {options.oracle} reads vectors of width {writer.lm.d_model}, {options.store} holds "
            f"{store.d_model}: give an oracle of the captured model"
        )
    if options.max_new_tokens > (room := writer.lm.max_length - limits.longest):
        raise RequestError(
            f"--max-new-tokens is {options.max_new_tokens}: {options.oracle} has room for {max(room, 0)} after the "
            f"longest prompt, which has {limits.longest} tokens: lower it, or --rows-per-prompt"
        )
    phases.phase(PREPARING)
    return AskRun(options, store, layer, questions, prompts, fingerprint, limits, writer)


@dataclass(frozen=True)
class AskRun:
    """One run, ready to start. fingerprint: of the prompts."""

    options: AskOptions
    store: CaptureStore
    layer: Site
    questions: Questions
    prompts: Prompts
    fingerprint: str
    limits: Limits
    writer: Writer

    def fill(self, table: ResultTable, announce: Announce, phases: Phases) -> None:
        """Ask what the table does not hold yet, and finish it."""
        samples = self.options.samples
        total, first = len(self.questions), table.done // samples
        announce(str(self) + (f" ({table.done:,} already there)" if first else ""))

        def write(columns: dict[str, Any]) -> None:
            table.append(columns)
            phases(table.done, total * samples)

        phases.phase(ASKING, "answers")
        with Background() as background, closing(self._chunks(first)) as chunks:
            for chunk in chunks:
                background.submit(lambda chunk=chunk: write(self.columns(chunk)))  # type: ignore[misc]
        table.finish(self._metadata())

    @property
    def rows(self) -> int:
        """Different rows that are asked about."""
        return len(np.unique(self.questions.rows))

    def prompt(self, number: int) -> Prompt:
        """What the oracle reads for this one of the questions' prompts."""
        questions = self.questions
        return self.prompts.of(questions.question_of(number), len(questions.rows_of(number)))

    def __str__(self) -> str:
        samples = self.options.samples
        each = "an answer each" if samples == 1 else f"{samples} answers each"
        return f"{len(self.questions):,} prompts about {self.rows:,} rows of {self.layer.label}, {each}"

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        given = self.options.to_dict()
        names = (
            "where",
            "limit",
            "rows_per_prompt",
            *DRAW_OPTIONS,
            "prefill",
            "precision",
        )
        return {name: given[name] for name in names} | {
            "layer": self.layer.key,
            "base": self.store.provenance.get("weights"),
            "store": self.store.attributes["store_id"],
            **self.writer.injection.to_dict(),
            "questions": self.questions.fingerprint(),
            "prompts": self.fingerprint,
            "drawn_by": "sequence and position",  # older versions: the place in the store
            "oracle": self.writer.lm.fingerprint(),
        }

    def _chunks(self, first: int) -> Generator[list[Answer], None, None]:
        """The answers from prompt `first` on, CHUNK at a time, fewer if they take long; those of a prompt together."""
        samples, total = self.options.samples, len(self.questions)
        group: list[Answer] = []
        since = time.monotonic()
        with closing(self.answers(np.arange(first, total))) as answers:
            for number, answer in enumerate(answers, 1):
                group.append(answer)
                if number % samples:
                    continue
                late = time.monotonic() - since >= COMMIT_SECONDS
                if late or len(group) + samples > CHUNK or number == (total - first) * samples:
                    yield group
                    group, since = [], time.monotonic()

    def answers(
        self, prompts: np.ndarray, watch: Watch = lambda tally: None
    ) -> Generator[Answer, None, None]:
        """All answers to these prompts, int64 [n], in their order. watch: told how far the oracle is"""
        options, samples = self.options, self.options.samples
        reader = self.store.layer(self.layer)
        without = self.without_direction(prompts)
        sound = prompts[without == None]  # noqa: E711
        written = self.writer.write(
            self._asked(reader, sound),
            self.limits,
            samples=samples,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling_of(options),
            batch_size=options.batch_size,
            watch=watch,
        )
        with closing(written):
            for prompt, status in zip(prompts.tolist(), without.tolist(), strict=True):
                for sample in range(samples):
                    if status is not None:
                        yield Answer(prompt, sample, "", status, 0)
                        continue
                    text = next(written)
                    words = (options.prefill + text.text).strip()
                    yield Answer(prompt, sample, words, "unclosed" if text.cut else "ok", text.n_tokens)

    def without_direction(self, prompts: np.ndarray) -> np.ndarray:
        """Of each prompt, object [n]: the status of its first vector without a direction, None if all have one."""
        return self._group_status[self.questions.group[prompts]]

    @cached_property
    def _group_status(self) -> np.ndarray:
        """The same of each group of rows, object [G]. Reads the norms of all rows."""
        questions, reader = self.questions, self.store.layer(self.layer)
        out = np.full(len(questions.start) - 1, None, object)
        of_rows = np.array(without_direction(reader.norm_at(questions.rows)), object)
        for place in np.flatnonzero(of_rows != None)[::-1].tolist():  # noqa: E711
            out[np.searchsorted(questions.start, place, "right") - 1] = of_rows[place]
        return out

    def _asked(self, reader: LayerReader, prompts: np.ndarray) -> Iterator[Asked]:
        """These prompts with their vectors on the device, which are read one block ahead."""
        questions, draws = self.questions, self.questions.draws(self.store)
        blocks = _blocks(questions, prompts)
        rows = (np.concatenate([questions.rows_of(p) for p in _of_groups(questions, b)]) for b in blocks)
        with closing(read_ahead(reader, rows, self.writer.lm.device)) as read:
            for block, vectors in zip(blocks, read, strict=True):
                groups, place = np.unique(questions.group[block], return_inverse=True)
                ends = np.cumsum(np.diff(questions.start)[groups])
                parts = vectors.split(np.diff(ends, prepend=0).tolist())
                for prompt, group in zip(block.tolist(), place.tolist(), strict=True):
                    yield Asked(prompt, self.prompt(prompt), parts[group], int(draws[prompt]))

    def columns(self, answers: list[Answer]) -> dict[str, Any]:
        """Of the table."""
        store, questions = self.store, self.questions
        about = [questions.rows_of(answer.prompt) for answer in answers]
        rows = np.array([of[0] for of in about])
        return row_columns(store, store.layer(self.layer), rows) | {
            "rows": [of.tolist() for of in about],
            "question": [questions.question_of(answer.prompt) for answer in answers],
            "sample": [answer.sample for answer in answers],
            "answer": [answer.text for answer in answers],
            "status": [answer.status for answer in answers],
            "n_tokens": [answer.n_tokens for answer in answers],
        }

    def _metadata(self) -> dict[str, Any]:
        lm = self.writer.lm
        return {
            **describe_run(),
            "run": self.options.to_dict(),
            "oracle": lm.name,
            "oracle_revision": lm.revision,
            **{f"oracle_{key}": value for key, value in lm.origin.items()},
            **self.writer.injection.to_dict(),
            "message": self.prompts.message,
            "placeholder": self.options.placeholder,
            "layer": self.layer.key,
        }


def _layer(store: CaptureStore, options: AskOptions) -> Site:
    held = [site for site in store.sites if site.part == options.site]
    if options.layer is None and len(held) > 1:
        raise RequestError(f"{options.store} holds {listed(held)}: give --layer")
    if options.layer is None and len(held) == 1:
        return held[0]
    site = Site.at(options.layer or 0, options.site)
    if site not in held:
        asked = f"--site {options.site}" if options.layer is None else f"--layer {site}"
        raise RequestError(f"{asked}: {options.store} holds layer {', '.join(map(str, store.sites))}")
    return site


def _blocks(questions: Questions, prompts: np.ndarray) -> list[np.ndarray]:
    """The prompts in blocks whose groups have READ_AHEAD rows together, or more if one group has."""
    if not len(prompts):
        return []
    new = np.append(True, np.diff(questions.group[prompts]) != 0)
    before = np.cumsum(questions.sizes[prompts] * new) - questions.sizes[prompts]
    cuts = np.flatnonzero(np.diff(before // READ_AHEAD, prepend=-1))
    return [prompts[a:b] for a, b in pairwise([*cuts, len(prompts)])]


def _of_groups(questions: Questions, block: np.ndarray) -> list[int]:
    """One prompt of each group of a block, in the order of the groups."""
    _, first = np.unique(questions.group[block], return_index=True)
    return block[first].tolist()
