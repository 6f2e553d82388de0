"""`nla-engine train`: the phases of a training, their checkpoints and measures, and the pair that comes out.

ar    the AR by supervised steps        av    the AV by supervised steps        rl    both by reinforcement
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_engine.config import TrainOptions
from nla_engine.errors import RequestError, already_there
from nla_engine.models.load import LanguageModel, load_model, pick_device, pick_dtype, tokenizer_of
from nla_engine.models.source import Source, find_source
from nla_engine.progress import Progress, heard
from nla_engine.store import CaptureStore
from nla_engine.store.directory import check_directory
from nla_engine.store.lease import Lease
from nla_engine.store.shards import make_directory, write_file_atomically, writing
from nla_engine.train import reinforce, supervised
from nla_engine.train.checkpoint import Place, read_place, read_state, write_state
from nla_engine.train.data import Data, read_data
from nla_engine.train.fit import Fitter, warmup_of
from nla_engine.train.lengths import check_lengths
from nla_engine.train.measure import Measure
from nla_engine.train.output import check_base, check_whole, write_pair, write_sidecars
from nla_engine.train.pair import TrainedAR, TrainedAV
from nla_engine.train.phases import PHASES, ends_at
from nla_engine.train.rollouts import Rollouts

CHECKPOINT, LOG, SUMMARY = "checkpoint", "log.jsonl", "training.json"
FILES = ("av", "ar", CHECKPOINT, LOG, SUMMARY)
#: Options that may differ when a training goes on.
_FREE = ("resume", "overwrite", "device", "out", "checkpoint_steps")
#: Steps from one line of the log to the next.
_LOGGED_EVERY = {"ar": 20, "av": 20, "rl": 5}
#: Steps over which a rate rises, at most. Few: a budget may end a phase long before its steps are done.
_WARMUP = 40


@dataclass(frozen=True)
class TrainSummary:
    """What a training made. warm: measured before reinforcement, None if it was not; last: at the end."""

    av: str
    ar: str
    base: str
    layer: int
    method: str
    rows: int
    held_out_rows: int
    documents: int
    held_out_documents: int
    steps: dict[str, int]
    warm: dict[str, Any] | None
    last: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def run_train(
    options: TrainOptions,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | Progress = lambda done, total: None,
) -> TrainSummary:
    """Train a pair. Raises RequestError or StoreError before anything is written if something is wrong."""
    _check_out(options)
    place = read_place(options.out / CHECKPOINT) if options.resume else None
    shaping = {key: value for key, value in options.to_dict().items() if key not in _FREE}
    if place is not None and (changed := [key for key in shaping if shaping[key] != place.options.get(key)]):
        raise RequestError(
            f"{options.out}: was begun with another --{changed[0].replace('_', '-')}: give the same options"
        )
    store = CaptureStore.open(options.store)
    device, progress = pick_device(options.device), heard(progress)
    name = options.model or store.provenance.get("model")
    if not name:
        raise RequestError(f"{options.store}: does not name the captured model: give --model")
    source = find_source(str(name))
    if source.adapter is not None:
        raise RequestError(f"--model {name}: is an adapter: give its base, or a checkpoint with it merged in")
    progress.phase("rows and texts")
    data = read_data(options, store, device)
    check_base(source, store.d_model, data.layer)
    if place is not None and place.data != data.fingerprint():
        raise RequestError(
            f"{options.out}: was begun with other rows or texts than {options.store} gives now: start again with "
            "--overwrite"
        )
    progress.phase("models")
    with tempfile.TemporaryDirectory() as scratch:  # nothing is in `out` before the models are known to fit
        tokenizer = tokenizer_of(source)
        least = int(min(data.trained.position.min(), data.held_out.position.min()))
        sidecars = Path(scratch)
        write_sidecars(sidecars, tokenizer, store.d_model, data.layer, options.injection_scale, least)
        training = _Training(options, data, source, sidecars, device, shaping, announce, progress)
        check_lengths(training.av, training.ar, data, options.max_new_tokens, announce)
        announce(
            f"{len(data.trained):,} rows of layer {data.layer} from {data.documents[0]:,} documents to train on, "
            f"{len(data.held_out):,} of {data.documents[1]:,} held out"
        )
        with writing(options.out):
            make_directory(options.out)
        with Lease.of_directory(options.out), closing(training.rollouts):
            if options.overwrite:
                _clear(options.out)
            if place is not None:
                training.take_up(place)
            training.run()
            summary = training.summary()
            here = Path(source.name)
            base = str(here.resolve()) if here.is_dir() else source.name
            write_pair(options.out, training.av, training.ar, base, source.revision)
            text = json.dumps(summary.to_dict(), indent=1, ensure_ascii=False) + "\n"
            write_file_atomically(options.out / SUMMARY, text.encode())
            shutil.rmtree(options.out / CHECKPOINT, ignore_errors=True)
    return summary


def _check_out(options: TrainOptions) -> None:
    out = options.out
    check_directory(out)
    there = [name for name in FILES if (out / name).exists()]
    if options.resume:
        if (out / SUMMARY).exists():
            raise RequestError(f"{out}: is finished: leave --resume out, or choose another --out")
    elif there and not options.overwrite:
        raise RequestError(already_there(out / there[0]))


def _clear(out: Path) -> None:
    for name in FILES:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


class _Training:
    """The models, and how far they are."""

    def __init__(
        self,
        options: TrainOptions,
        data: Data,
        source: Source,
        sidecars: Path,
        device: torch.device,
        shaping: dict[str, Any],
        announce: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.options, self.data, self.source, self.shaping = options, data, source, shaping
        self.announce, self.progress = announce, progress
        lora = options.method == "lora"
        served = pick_dtype(None, device)
        trained = served if lora else torch.float32

        def load(dtype: torch.dtype, **more: Any) -> LanguageModel:
            return load_model(source.name, source=source, device=device, dtype=dtype, **more)

        seed = options.seed
        self.ar = TrainedAR(
            load(trained, headless=True, blocks=data.layer + 1),
            sidecars / "ar",
            options.ar_rank if lora else None,
            seed,
        )
        check_whole(self.ar)
        self.av = TrainedAV(load(trained), sidecars / "av", options.av_rank if lora else None, seed + 1)
        self.rollouts = Rollouts(
            load(served), self.av, new_tokens=options.max_new_tokens, slots=options.slots, seed=seed
        )
        self.known = data.fingerprint()
        self.measure = Measure(data.held_out, options.measured_rows, seed)
        self.steps = {"ar": options.ar_steps, "av": options.av_steps, "rl": options.rl_steps}
        self.phase, self.step, self.done = "ar", 0, dict.fromkeys(PHASES, 0)
        self.spent, self._since = 0.0, time.perf_counter()
        self.began = 0.0
        self.fitters = self._fitters()
        self.warm: dict[str, torch.Tensor] = {}
        self.log: list[dict[str, Any]] = []

    def _fitters(self) -> dict[str, Fitter]:
        """Of what the phase trains, with nothing in their memory."""
        rate = self.options.rl_rate if self.phase == "rl" else self.options.rate
        models = {"ar": self.ar, "av": self.av}
        return {
            name: Fitter(model.parameters, rate)
            for name, model in models.items()
            if self.phase in (name, "rl")
        }

    @property
    def seconds(self) -> float:
        """Of training so far, over all runs."""
        return self.spent + time.perf_counter() - self._since

    def run(self) -> None:
        """Every phase from where it is to its end."""
        names = list(PHASES)
        for phase in names[names.index(self.phase) :]:
            if phase != self.phase:
                self._enter(phase)
            if self.steps[phase]:
                self._run_phase()

    def _enter(self, phase: str) -> None:
        self.phase, self.step, self.began = phase, 0, self.seconds
        self.fitters = self._fitters()
        if phase == "rl" and self.steps["rl"]:
            self.warm = {name: p.detach().clone() for name, p in self.av.parameters.items()}

    def _run_phase(self) -> None:
        options, total = self.options, self.steps[self.phase]
        warmup, measured = warmup_of(total, _WARMUP), int(self._part() * options.measures)
        self.progress.phase(self.phase, "steps")
        if self.phase == "rl" and self.step == 0:
            self._measure()  # the warm start
        while self.step < total and (spent := self._part()) < 1:
            told = getattr(self, f"_{self.phase}_step")()
            for fitter in self.fitters.values():
                rate = fitter.step(self.step, warmup, spent)
            self.step += 1
            self.done[self.phase] = self.step
            if self.step % _LOGGED_EVERY[self.phase] == 0 or self.step == total:
                self._note({**told, "rate": rate})
            if measured < (due := int(self._part() * options.measures)) < options.measures:
                measured = due
                self._measure()
            if self.step % options.checkpoint_steps == 0:
                self._keep()
            self.progress(self.step, total)
        self._measure()
        self._keep()

    def _part(self) -> float:
        """The part of the phase that is over, by steps or by the budget, whichever is larger."""
        by_steps = self.step / self.steps[self.phase]
        if self.options.budget is None:
            return by_steps
        end = ends_at(self.phase, self.steps) * self.options.budget * 60
        return max(by_steps, (self.seconds - self.began) / max(end - self.began, 1e-9))

    def _draw(self, count: int) -> np.ndarray:
        """int64 [count]: places of trained rows for this step."""
        phase = list(PHASES).index(self.phase)
        draw = np.random.default_rng([self.options.seed, phase, self.step])
        return draw.integers(len(self.data.trained), size=count)

    def _ar_step(self) -> dict[str, Any]:
        chosen, rows = self._draw(self.options.batch_size), self.data.trained
        mse = supervised.ar_step(
            self.ar,
            rows.vectors[torch.from_numpy(chosen)],
            [rows.texts[place] for place in chosen.tolist()],
            tokens_at_once=self.options.tokens_at_once,
        )
        return {"mse_nrm": mse.mean()}

    def _av_step(self) -> dict[str, Any]:
        options = self.options
        loss = supervised.av_step(
            self.av,
            self.data.trained,
            self._draw(options.batch_size),
            new_tokens=options.max_new_tokens,
            tokens_at_once=options.tokens_at_once,
        )
        return {"loss": loss}

    def _rl_step(self) -> dict[str, float]:
        options = self.options
        chosen = self._draw(options.vectors)
        vectors = self.data.trained.vectors[torch.from_numpy(chosen)]
        self.rollouts.update()
        begun = time.perf_counter()
        written = self.rollouts.write(
            vectors,
            samples=options.samples,
            temperature=1.0,  # of the distribution whose log-probabilities the loss has
            first_draw=self.step * options.vectors,
        )
        writing = time.perf_counter() - begun
        repeated = vectors.repeat_interleave(options.samples, 0)
        texts = [each.text for each in written]
        mse = supervised.ar_step(self.ar, repeated, texts, tokens_at_once=options.tokens_at_once)
        judged = reinforce.judge(mse, written, options.samples, options.max_new_tokens)
        apart = reinforce.av_step(
            self.av,
            repeated,
            written,
            judged.advantage,
            kl=options.kl,
            warm=self.warm,
            tokens_at_once=options.tokens_at_once,
        )
        return {
            "reward": float(judged.reward.mean()),
            "mse_nrm": float(mse.mean()),
            "kl": apart,
            "closed": float(np.mean([each.status == "ok" for each in written])),
            "tokens": float(np.mean([len(each.ids) for each in written])),
            "texts_per_second": len(written) / writing,
        }

    def _measure(self) -> None:
        measured = self.measure(self.ar, None if self.phase == "ar" else self.rollouts)
        self._note({"measured": measured.to_dict()})
        self.announce(f"{self.phase} {self.step}: {measured.line()}")

    def _note(self, told: dict[str, Any]) -> None:
        """A line of the log."""
        line = {"phase": self.phase, "step": self.step, "seconds": round(self.seconds, 1)}
        plain = {key: float(value) if torch.is_tensor(value) else value for key, value in told.items()}
        rounded = {
            key: round(value, 6) if isinstance(value, float) else value for key, value in plain.items()
        }
        self.log.append(line | rounded)
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in self.log)
        write_file_atomically(self.options.out / LOG, lines.encode())

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, by name."""
        found: dict[str, torch.Tensor] = {f"av/{name}": weight for name, weight in self.av.parameters.items()}
        found |= {f"ar/{name}": weight for name, weight in self.ar.parameters.items()}
        found |= {f"warm/{name}": weight for name, weight in self.warm.items()}
        for which, fitter in self.fitters.items():
            found |= {f"{which}_fit/{name}": value for name, value in fitter.state().items()}
        return found

    def _keep(self) -> None:
        """Write a checkpoint."""
        place = Place(self.phase, self.step, self.seconds, self.began, self.done, self.shaping, self.known)
        write_state(self.options.out / CHECKPOINT, place, self._tensors())

    def take_up(self, place: Place) -> None:
        """Go on from the checkpoint."""
        self.phase, self.step, self.spent, self.began = place.phase, place.step, place.seconds, place.began
        self.done, self._since = dict(place.done), time.perf_counter()
        self.fitters = self._fitters()
        held: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in read_state(self.options.out / CHECKPOINT).items():
            which, _, name = key.partition("/")
            held.setdefault(which, {})[name] = tensor
        with torch.no_grad():
            for which, model in (("av", self.av), ("ar", self.ar)):
                for name, weight in model.parameters.items():
                    weight.copy_(held[which][name])
        device = self.av.lm.device
        self.warm = {name: weight.to(device) for name, weight in held.get("warm", {}).items()}
        for which, fitter in self.fitters.items():
            fitter.load(held.get(f"{which}_fit", {}))
        order = list(PHASES)
        here = order.index(self.phase), self.step
        lines = (self.options.out / LOG).read_text(encoding="utf-8").splitlines()
        noted = [json.loads(line) for line in lines]
        self.log = [each for each in noted if (order.index(each["phase"]), each["step"]) <= here]
        self.announce(f"goes on at step {self.step} of phase {self.phase}")

    def summary(self) -> TrainSummary:
        """What came out."""
        measured = [each for each in self.log if "measured" in each]
        before = [each["measured"] for each in measured if each["phase"] == "rl" and each["step"] == 0]
        data, out = self.data, self.options.out
        return TrainSummary(
            av=str(out / "av"),
            ar=str(out / "ar"),
            base=self.source.name,
            layer=data.layer,
            method=self.options.method,
            rows=len(data.trained),
            held_out_rows=len(data.held_out),
            documents=data.documents[0],
            held_out_documents=data.documents[1],
            steps=self.done,
            warm=before[0] if before else None,
            last=measured[-1]["measured"],
            seconds=round(self.seconds, 1),
        )
