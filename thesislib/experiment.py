"""A configuration measured: stages carried out on a subject and the result measured; which measurement a record is; and
the same measured again from its record."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from thesislib.compress.stage import STAGES, Stage
from thesislib.config import build
from thesislib.errors import BadInput, shown, unknown
from thesislib.evaluate.setup import Setup, setup_of, task_of
from thesislib.evaluate.speed import SECONDS_PER_TOKEN, token_seconds
from thesislib.files import read_json
from thesislib.formats.artifact_json import RECORD
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import ComputedLinear, unpack_all
from thesislib.model.lowrank import LowRank
from thesislib.model.subject import Subject
from thesislib.pipeline.label import DENSE
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import Job
from thesislib.records.measurement import Measurement
from thesislib.sources.corpus import EMBEDDED_TEXT
from thesislib.sources.rows import default_data, origin_of


def recipe_of(stages: Sequence) -> Recipe:
    """The recipe of some stages' configs; of none, which leaves a subject as it is."""
    return Recipe(tuple(stages), tuple(f"stage {n}" for n, _ in enumerate(stages, 1)))


def recipe_hash(recipe: Recipe) -> str | None:
    """12 hex digits of a sha256 over the stages with every setting; None for no stages."""
    text = json.dumps(recipe.entries(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if recipe.stages else None


def build_history(recipe: Recipe, base: dict, data: str, size: dict, reports: Sequence[dict]) -> dict:
    """How a measured model came about, as its records hold it: see `thesislib.records.schema.Made`.

    Args:
        recipe: the stages.
        base: name and fingerprint of the model that the stages began with.
        data: the data spec that they were calibrated on or trained with.
        size: parameters and bytes of the result, see `thesislib.formats.sizes.sizes`.
        reports: what each stage reported.
    """
    stages = recipe.entries()
    facts = {
        "label": recipe.label or DENSE,
        "recipe": recipe_hash(recipe),
        "stage": next(iter(stages[-1])) if stages else None,
        "stages": stages,
        "base": base,
        "data": origin_of(data),
        "bytes": size,
        "reports": list(reports),
    }
    return json.loads(json.dumps(facts))  # as it will be read back: JSON has lists only, and keys that are texts


def as_record(m: Measurement, history: dict, **more: object) -> Measurement:
    """A measurement with all that would make it again: the model's history, and how far another machine may be off.

    Args:
        m: the measurement.
        history: of the measured model, see `build_history`.
        more: further fields of the record's provenance.
    """
    m = m.with_provenance(made=history, **more)
    return m if m.metric == SECONDS_PER_TOKEN else m.with_provenance(tolerance=tolerance(m))


@dataclass(frozen=True)
class Prepared:
    """A configuration ready to be measured.

    Attributes:
        model: the compressed model.
        history: how it came about, see `build_history`.
    """

    model: Subject
    history: dict

    @cached_property
    def unpacked(self) -> Subject:
        """The model with its packed weights unpacked once, the same numbers as at every use: a model of 4 bits answers
        questions three times as fast."""
        packed = any(isinstance(m, ComputedLinear) and not isinstance(m, LowRank) for m in self.model.model.modules())
        if not packed:
            return self.model
        model = self.model.copy(unpack=False)
        unpack_all(model.model, but=(LowRank,))
        return model

    def measure(self, setup: Setup, data: str, **more: object) -> Measurement:
        """The record of this model measured by a setup on a data spec; `more` goes into its provenance."""
        return as_record(setup.measure(self.unpacked, data), self.history, **more)

    def time(self, tokens: int, **more: object) -> Measurement:
        """The record of the seconds that this model takes for a token, over so many; `more` goes into its
        provenance."""
        return as_record(token_seconds(self.model, tokens), self.history, **more)


def prepare(subject: str, stages: Sequence, *, data: str, dtype: str = "bfloat16", device: str = "cpu") -> Prepared:
    """Carry out stages on the subject of a spec; stages whose result the cache holds are not carried out again.

    Args:
        subject: a subject spec.
        stages: their configs; none for the subject as it is.
        data: a data spec for calibration and training.
        dtype, device: see `thesislib.formats.load.load_subject`.

    Raises:
        BadInput: stages that cannot work on this subject, or whatever one of them refuses.
    """
    recipe = recipe_of(stages)
    job = Job.prepare(subject, recipe, data, dtype, device)
    model, reports = job.after(len(stages))
    if stages:
        size = read_json(job.folder(len(stages)) / RECORD)["sizes"]
    else:
        size = {**sizes(model), "bytes_on_disk": predicted_disk_bytes(model)}
    return Prepared(model, build_history(recipe, job.base, data, size, reports))


def described(
    m: Measurement, base: Subject | dict, data: str, stages: Sequence = (), label: str | None = None
) -> Measurement:
    """The record of a subject that a chapter compressed by itself, without `prepare`; its bytes were not counted.

    Args:
        m: measured on the subject after `stages`, or under the plan in its provenance.
        base: what the stages or the plan began with, or its name and fingerprint.
        data: the data spec of the calibration.
        stages: their configs.
        label: of a plan, for which no stages stand.
    """
    facts = {"name": base.name, "fingerprint": base.fingerprint} if isinstance(base, Subject) else base
    history = build_history(recipe_of(stages), facts, data, {}, [])
    return as_record(m, {**history, "label": label or history["label"]})


# ---------------------------------------------------------------- which measurement it is


def identity(
    fingerprint: str, dtype: str, data: str | None, stages: list[dict], setup: Setup | str, text: str | None
) -> str:
    """16 hex digits that stand for one measurement: records with the same identity are the same measurement.

    Args:
        fingerprint: of the model that the stages began with.
        dtype: in which the model ran.
        data: the kind of data that the stages were calibrated on or trained with; it does not count without stages.
        stages: {word: settings} of each, with every setting.
        setup: how it was measured, less its batch, which changes rounding only; of a timing, `timing_setup`.
        text: sha256 of the text or items that were measured on.
    """
    measured = setup if isinstance(setup, str) else {**setup.plain(), "batch": None}
    facts = json.dumps([fingerprint, dtype, data if stages else None, stages, measured, text], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def timing_setup(repeats: int, device: str) -> str:
    """The setup of a timing, for its identity: another number of repetitions, or another type of device, makes another
    measurement."""
    return f"{SECONDS_PER_TOKEN}, {repeats} on {device.partition(':')[0]}"


def identity_of(m: Measurement) -> str | None:
    """The identity of a record; None for one that does not say enough, such as chapter 7's timings.

    A plan, for which no stages stand, counts as a stage: it is not the dense model that it was made from.
    """
    history = m.provenance.get("made") or {}
    try:
        if m.metric == SECONDS_PER_TOKEN:
            setup: Setup | str = timing_setup(m.settings["repeats"], m.provenance["hardware"]["device"])
        else:
            setup = setup_of(m)
        text = m.provenance.get("corpus_sha256") or m.settings.get("text_sha256")
        base, stages = history["base"]["fingerprint"], history["stages"]
        if not stages and history["label"] != DENSE:
            stages = [{"plan": m.provenance["plan"]}]
        return identity(base, m.provenance["dtype"], history["data"], stages, setup, text)
    except (BadInput, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Conditions:
    """What the identities of planned measurements have in common.

    Attributes:
        fingerprint: of the subject.
        dtype: in which it runs.
        data: the kind of data for calibration and training.
        texts: the sha256 of the text or items of each setup (its batch None).
        device: on which time is measured.
    """

    fingerprint: str
    dtype: str
    data: str
    texts: Mapping[Setup, str | None] = dataclasses.field(hash=False)
    device: str = "cpu"

    @classmethod
    def of(cls, job: Job, data: str, setups: Iterable[Setup]) -> "Conditions":
        """Those of setups that measure on a data spec; their texts are read."""
        texts = {setup: setup.corpus_sha256(data) for setup in set(map(without_batch, setups))}
        return cls(job.base["fingerprint"], job.dtype, origin_of(data), texts, job.device)

    def identity(self, stages: Sequence[Stage], setup: Setup | int) -> str | None:
        """Of a planned measurement of the model after these stages; None if the setup's text is not known.

        Args:
            stages: their configs.
            setup: how it is measured; of a timing, the number of repetitions.
        """
        if isinstance(setup, int):
            return self._identity(stages, timing_setup(setup, self.device), None)
        if (same := without_batch(setup)) not in self.texts:
            return None
        return self._identity(stages, setup, self.texts[same])

    def of_model(self, stages: Sequence[Stage]) -> str:
        """The identity of the model after these stages, whatever is measured of it."""
        return self._identity(stages, "any", None)

    def _identity(self, stages: Sequence[Stage], setup: Setup | str, text: str | None) -> str:
        return identity(self.fingerprint, self.dtype, self.data, recipe_of(stages).entries(), setup, text)


def without_batch(setup: Setup) -> Setup:
    """The same setup for any batch, which changes rounding only."""
    return dataclasses.replace(setup, batch=None)


# ---------------------------------------------------------------- measured again


def tolerance(m: Measurement) -> dict[str, float]:
    """How far the same measurement on another machine may lie from this record: {"relative": share} or {"absolute":
    difference}.

    On the same processor with as many threads a record is made again to the last bit. Elsewhere matrix products add up
    in another order: nothing to see in float32, some in bfloat16. Training follows its own rounding for hundreds of
    steps and ends at another adapter. GPTQ does so for hundreds of columns and ends at other codes (1.3 % of perplexity
    between one thread and two). Answers differ where two tokens were about equally likely. A tolerance that the record
    itself holds counts where it is larger.
    """
    recorded = m.provenance.get("tolerance") or {}
    amplified = any(STAGES[word].amplifies for stage in m.stages for word in stage if word in STAGES)
    half = m.provenance["dtype"] in ("bfloat16", "float16")
    relation, allowed = task_of(m).tolerance
    if recorded and relation not in recorded:
        return recorded
    # records made before GPTQ was known to need more hold too small a tolerance
    return {relation: max(allowed[2 if amplified else int(half)], recorded.get(relation, 0))}


@dataclass(frozen=True)
class Verdict:
    """A record beside the same measurement made again.

    Attributes:
        recorded: the record.
        again: the measurement made again.
        tolerance: how far the two may lie apart, see `tolerance`.
        same_subject: whether the measured weights are equal to the last bit.
    """

    recorded: Measurement
    again: Measurement
    tolerance: dict[str, float]
    same_subject: bool

    @property
    def same_bits(self) -> bool:
        """Whether the two values are equal to the last bit."""
        return _finite(self.recorded.value) == _finite(self.again.value)

    @property
    def agrees(self) -> bool:
        """Whether the two values lie within the tolerance."""
        if self.same_bits or None in (_finite(self.recorded.value), _finite(self.again.value)):
            return self.same_bits
        apart = abs(self.again.value - self.recorded.value)
        return apart <= self.tolerance.get("absolute", 0) + self.tolerance.get("relative", 0) * abs(self.recorded.value)

    def __str__(self) -> str:
        (relation, allowed), r = next(iter(self.tolerance.items())), self.recorded
        then, now = ("not finite" if _finite(x) is None else f"{x:.6g}" for x in (r.value, self.again.value))
        if self.same_bits:
            verdict = "the same to the last bit"
        else:
            verdict = f"{'within' if self.agrees else 'NOT within'} the tolerance of {allowed:.1%} {relation}"
        if not self.same_subject:
            verdict += (
                "; the weights are not the recorded ones to the last bit: other rounding, or another calibration text"
            )
        return f"{r.metric} on {r.task}: recorded {then}, again {now}: {verdict}"


def _finite(value: float | None) -> float | None:
    """The value as a record keeps it: None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def again(
    m: Measurement,
    subject: str = "embedded",
    data: str | None = None,
    device: str = "cpu",
    reference: str | None = None,
) -> Verdict:
    """Make a recorded measurement once more from its record.

    Args:
        m: the record.
        subject: a spec of the model that its stages began with.
        data: a data spec for its stages, by default `thesislib.sources.rows.default_data()`. What is measured is looked
            for there, then in the embedded data.
        device: a torch device.
        reference: a spec of the model that it was held against; by default the record's own.

    Raises:
        BadInput: the subject, the reference or the text differs from the record's; the record has stages or settings
            that this version does not know.
    """
    recorded, data = m.provenance, data or default_data()
    setup = setup_of(m)
    if reference is not None:
        setup = dataclasses.replace(setup, reference=reference)
    missing = [key for key in ("subject", "fingerprint", "dtype", "settings") if key not in recorded]
    if missing:
        raise BadInput(f"the record does not say its {', '.join(missing)}: it cannot be measured again")
    text_data = _data_with_text(m, data, setup)  # first: the stages may take minutes
    model, same_subject = _compressed_again(m, subject, data, device)
    # with the weights unpacked, as they were when the record was made: packed ones take another kernel for few rows
    result = setup.measure(Prepared(model, {}).unpacked, text_data)
    _check_same_items(m, result, text_data, setup)
    return Verdict(m, result, tolerance(m), same_subject)


def _compressed_again(m: Measurement, subject: str, data: str, device: str) -> tuple[Subject, bool]:
    """The record's stages carried out again, and whether that gave the recorded weights.

    Raises:
        BadInput: the subject is not the record's; the record has stages that this version does not know.
    """
    recorded, history = m.provenance, m.made
    stages = [stage_of(stage) for stage in history.get("stages", [])]
    job = Job.prepare(subject, recipe_of(stages), data, recorded["dtype"], device)
    base = history.get("base", {}).get("fingerprint")
    if base is not None and job.base["fingerprint"] != base:
        raise BadInput(
            f"the record began with {recorded['subject']}, fingerprint {base[:12]}...; '{subject}' in "
            f"{recorded['dtype']} has {job.base['fingerprint'][:12]}...: name the record's subject"
        )
    model, _ = job.after(len(stages))
    if recorded.get("plan") is not None and not stages:
        model = apply_plan(model, recorded["plan"])
    # many plans are measured in one pass, under the fingerprint of the whole model
    same = recorded["fingerprint"] in (model.fingerprint, job.base["fingerprint"])
    if base is None and not same:  # measured directly, without `Prepared` or `described`
        raise BadInput(
            f"the record is of {recorded['subject']}, fingerprint {recorded['fingerprint'][:12]}...; '{subject}' in "
            f"{recorded['dtype']} has {model.fingerprint[:12]}...: name the record's subject"
        )
    return model, same


def _data_with_text(m: Measurement, data: str, setup: Setup) -> str:
    """The data spec that has the text or the items of the record `m`: `data`, or the embedded text.

    Chapter 5 calibrates on one and measures on the other.

    Raises:
        BadInput: neither has them.
    """
    recorded = m.provenance.get("corpus_sha256") or m.settings.get("text_sha256")
    now = setup.corpus_sha256(data) if recorded else None
    if now is None or now == recorded:
        return data
    if m.task == EMBEDDED_TEXT and setup.corpus_sha256("embedded") == recorded:
        return "embedded"
    raise BadInput(
        f"data '{data}' has another text for {m.task} (sha256 {now[:12]}..., recorded {recorded[:12]}...): "
        "name the data that it was made with"
    )


def _check_same_items(m: Measurement, result: Measurement, data: str, setup: Setup) -> None:
    """Raises BadInput unless a result was measured on the items, the reference and the prompts of the record `m`."""
    if [i["id"] for i in result.items] != [i["id"] for i in m.items]:
        raise BadInput(
            f"data '{data}' gives {result.n} other items ({result.task}) than the record's {m.n} ({m.task}): "
            "name the data that it was made with"
        )
    now, then = (x.settings.get("reference_fingerprint") for x in (result, m))
    if now != then:
        raise BadInput(
            f"the record was held against a reference with fingerprint {str(then)[:12]}...; {shown(setup.reference)} "
            f"has {str(now)[:12]}...: name the record's by --reference"
        )
    now, then = (x.settings.get("prompts_sha256") for x in (result, m))
    if then is not None and now != then:  # records made before prompts were hashed have none
        raise BadInput(
            f"the questions are put in other words than the record's (sha256 of all prompts {str(now)[:12]}..., "
            f"recorded {str(then)[:12]}...): expected {m.provenance['subject']} with the tokenizer and chat template "
            "that it was measured with"
        )


def stage_of(recorded: dict[str, dict]) -> Stage:
    """A stage's config from a record: {word: settings}.

    Raises:
        BadInput: a stage or a setting that this version does not know.
    """
    try:
        ((name, settings),) = recorded.items()
        if name in STAGES:
            return build(STAGES[name], settings)
    except BadInput as error:
        raise BadInput(f"stage '{name}' in the record: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"stage {recorded!r} in the record is not understood: expected a name and its settings"
        ) from error
    raise unknown("stage in the record", name, STAGES)
