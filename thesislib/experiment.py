"""A configuration measured: stages carried out on a subject and the result measured; and the same once more from a
record."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from thesislib.compress.stage import STAGES
from thesislib.config import build
from thesislib.errors import BadInput, shown, unknown
from thesislib.evaluate.setup import Setup, setup_of, task_of
from thesislib.files import read_json
from thesislib.formats.artifact_json import RECORD
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import ComputedLinear
from thesislib.model.subject import Subject
from thesislib.pipeline.label import DENSE
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import Job
from thesislib.records.measurement import Measurement
from thesislib.sources.rows import default_data, origin_of


def recipe_of(stages: Sequence) -> Recipe:
    """The recipe of some stages' configs; of none, which leaves a subject as it is."""
    return Recipe(tuple(stages), tuple(f"stage {n}" for n, _ in enumerate(stages, 1)))


def recipe_hash(recipe: Recipe) -> str | None:
    """12 digits that stand for the stages with every setting; None for no stages."""
    text = json.dumps(recipe.entries(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if recipe.stages else None


def made(recipe: Recipe, base: dict, data: str, size: dict, reports: Sequence[dict]) -> dict:
    """What a record says of how its subject was made.

    label, recipe, stage: the configuration, its hash and its last stage's kind. stages: all settings. base: name and
    fingerprint of what the stages began with. data: the kind of data they were calibrated on or trained with. bytes: of
    the result, see `thesislib.formats.sizes.sizes`. reports: what each stage said of itself.
    """
    plain = recipe.entries()
    facts = {
        "label": recipe.label or DENSE,
        "recipe": recipe_hash(recipe),
        "stage": next(iter(plain[-1])) if plain else None,
        "stages": plain,
        "base": base,
        "data": origin_of(data),
        "bytes": size,
        "reports": list(reports),
    }
    return json.loads(json.dumps(facts))  # as it will be read back: JSON has lists only, and keys that are texts


@dataclass(frozen=True)
class Prepared:
    """A configuration ready to be measured: the model, and what its records say of how it was made (see `made`)."""

    model: Subject
    made: dict

    @cached_property
    def unpacked(self) -> Subject:
        """The model with its packed weights unpacked once, the same numbers as at every use: one of 4 bits answers
        questions three times as fast."""
        return (
            self.model.copy() if any(isinstance(m, ComputedLinear) for m in self.model.model.modules()) else self.model
        )

    def measure(self, setup: Setup, data: str, **more: object) -> Measurement:
        """The measurement by a setup on a data spec, with all that would make it again; `more` is noted beside it."""
        m = self.noted(setup.measure(self.unpacked, data), **more)
        return m.with_provenance(tolerance=tolerance(m))

    def noted(self, m: Measurement, **more: object) -> Measurement:
        """A measurement of this model that says how the model was made, and `more`."""
        return m.with_provenance(made=self.made, **more)


def prepare(subject: str, stages: Sequence, *, data: str, dtype: str = "bfloat16", device: str = "cpu") -> Prepared:
    """Carry out stages on the subject of a spec; what the cache holds is not made again.

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
    size = (
        read_json(job.folder(len(stages)) / RECORD)["sizes"]
        if stages
        else {**sizes(model), "bytes_on_disk": predicted_disk_bytes(model)}
    )
    return Prepared(model, made(recipe, job.base, data, size, reports))


def described(
    m: Measurement, base: Subject | dict, data: str, stages: Sequence = (), label: str | None = None
) -> Measurement:
    """A measurement of a subject that a chapter made by itself, noting what would make it again; its bytes were not
    counted.

    Args:
        m: made on the subject after `stages`, or under the plan in its provenance.
        base: what the stages or the plan began with, or its name and fingerprint.
        data: a data spec, of the calibration.
        stages: their configs.
        label: of a plan, for which no stages stand.
    """
    facts = {"name": base.name, "fingerprint": base.fingerprint} if isinstance(base, Subject) else base
    note = made(recipe_of(stages), facts, data, {}, [])
    m = m.with_provenance(made={**note, "label": label or note["label"]})
    return m.with_provenance(tolerance=tolerance(m))


# ---------------------------------------------------------------- once more


def tolerance(m: Measurement) -> dict[str, float]:
    """How far the same measurement may lie from this one on another machine: {"relative": share} or {"absolute":
    difference}.

    On the same processor with as many threads a record is made again to the last bit. Elsewhere matrix products add up
    in another order: nothing to see in float32, some in bfloat16. Training, which follows its own rounding for hundreds
    of steps, ends at another adapter, and GPTQ, which does so for hundreds of columns, at other codes (1.3 % of
    perplexity between one thread and two). What a record states counts where it is more. Answers differ where two
    tokens were about equally likely.
    """
    made, stated = m.provenance, m.provenance.get("tolerance") or {}
    amplified = any(STAGES[word].amplifies for stage in m.stages for word in stage if word in STAGES)
    rank = 2 if amplified else 1 if made["dtype"] in ("bfloat16", "float16") else 0
    kind, allowed = task_of(m).tolerance
    # rows made before GPTQ was known to need more state too little
    return {kind: max(allowed[rank], stated.get(kind, 0))} if kind in stated or not stated else stated


@dataclass(frozen=True)
class Verdict:
    """A record beside the same measurement made again.

    same_bits: the value is equal to the last bit. same_subject: so are the weights that were measured. agrees: the
    values lie within the record's tolerance.
    """

    recorded: Measurement
    again: Measurement
    tolerance: dict[str, float]
    same_subject: bool

    @property
    def same_bits(self) -> bool:
        """See the class."""
        return _finite(self.recorded.value) == _finite(self.again.value)

    @property
    def agrees(self) -> bool:
        """See the class."""
        if self.same_bits or None in (_finite(self.recorded.value), _finite(self.again.value)):
            return self.same_bits
        apart = abs(self.again.value - self.recorded.value)
        return apart <= self.tolerance.get("absolute", 0) + self.tolerance.get("relative", 0) * abs(self.recorded.value)

    def __str__(self) -> str:
        (kind, allowed), r = next(iter(self.tolerance.items())), self.recorded
        word = "the same to the last bit" if self.same_bits else "within" if self.agrees else "NOT within"
        rest = "" if self.same_bits else f" the tolerance of {allowed:.1%} {kind}"
        weights = (
            ""
            if self.same_subject
            else "; the weights are not the recorded ones to the last bit: other rounding, or another calibration text"
        )
        then, now = ("not finite" if _finite(x) is None else f"{x:.6g}" for x in (r.value, self.again.value))
        return f"{r.metric} on {r.task}: recorded {then}, again {now}: {word}{rest}{weights}"


def _finite(value: float | None) -> float | None:
    """As a record keeps it: None for what is not finite."""
    return value if value is not None and math.isfinite(value) else None


def again(
    m: Measurement,
    subject: str = "embedded",
    data: str | None = None,
    device: str = "cpu",
    reference: str | None = None,
) -> Verdict:
    """Make a recorded measurement once more from what its record says.

    Args:
        m: the record.
        subject: a spec of what it began with.
        data: a data spec that has its text; by default `thesislib.sources.rows.default_data()`.
        device: a torch device.
        reference: a spec of the model that it was held against; by default the record's own.

    Raises:
        BadInput: the subject, the reference or the text is another than the record's; stages or settings this version
            does not know.
    """
    made, data = m.provenance, data or default_data()
    setup = setup_of(m)
    if reference is not None:
        setup = dataclasses.replace(setup, reference=reference)
    missing = [key for key in ("subject", "fingerprint", "dtype", "settings") if key not in made]
    if missing:
        raise BadInput(f"the record does not say its {', '.join(missing)}: it cannot be measured again")
    note = made.get("made") or {}
    stages = [stage_of(plain) for plain in note.get("stages", [])]
    job = Job.prepare(subject, recipe_of(stages), data, made["dtype"], device)
    base = note.get("base", {}).get("fingerprint")
    if base is not None and job.base["fingerprint"] != base:
        raise BadInput(
            f"the record began with {made['subject']}, fingerprint {base[:12]}...; '{subject}' in {made['dtype']} "
            "has "
            f"{job.base['fingerprint'][:12]}...: name the record's subject"
        )
    model, _ = job.after(len(stages))
    if made.get("plan") is not None and not stages:
        model = apply_plan(model, made["plan"])
    same = made["fingerprint"] in (
        model.fingerprint,
        job.base["fingerprint"],
    )  # many plans are measured in one pass, under that of the whole
    if base is None and not same:  # measured directly, without `Prepared` or `described`
        raise BadInput(f"the record is of {made['subject']}, fingerprint {made['fingerprint'][:12]}...; '{subject}' in "
            f"{made['dtype']} has "
                       f"{model.fingerprint[:12]}...: name the record's subject")  # fmt: skip
    result = setup.measure(
        Prepared(model, {}).unpacked, data
    )  # as the record was: few rows of packed weights are multiplied by other kernels
    if [i["id"] for i in result.items] != [i["id"] for i in m.items]:
        raise BadInput(
            f"data '{data}' gives {result.n} other items ({result.task}) than the record's {m.n} ({m.task}): "
            "name the data that it was made with"
        )
    for key, now in (
        ("text_sha256", result.settings.get("text_sha256")),
        ("corpus_sha256", result.provenance.get("corpus_sha256")),
    ):
        then = made["settings"].get(key, made.get(key))
        if then is not None and now is not None and then != now:
            raise BadInput(
                f"data '{data}' has another text for {m.task} (sha256 {now[:12]}..., recorded {then[:12]}...): "
                "name the data that it was made with"
            )
    now, then = (x.settings.get("reference_fingerprint") for x in (result, m))
    if now != then:
        raise BadInput(
            f"the record was held against a reference with fingerprint {str(then)[:12]}...; {shown(setup.reference)} "
            f"has {str(now)[:12]}...: "
            "name the record's by --reference"
        )
    now, then = (x.settings.get("prompts_sha256") for x in (result, m))
    if then is not None and now != then:  # records made before prompts were hashed have none
        raise BadInput(
            f"the questions are put in other words than the record's (sha256 of all prompts {str(now)[:12]}..., "
            f"recorded {str(then)[:12]}...): "
            f"expected {made['subject']} with the tokenizer and chat template that it was measured with"
        )
    return Verdict(m, result, tolerance(m), same)


def stage_of(plain: dict[str, dict]):
    """A stage's config from a record: {name: settings}.

    Raises:
        BadInput: a stage or a setting that this version does not know.
    """
    try:
        ((name, settings),) = plain.items()
        if name in STAGES:
            return build(STAGES[name], settings)
    except BadInput as error:
        raise BadInput(f"stage '{name}' in the record: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(f"stage {plain!r} in the record is not understood: expected a name and its settings") from error
    raise unknown("stage in the record", name, STAGES)
