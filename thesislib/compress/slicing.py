"""SliceGPT: fewer features in the residual stream, by a rotation that puts its principal directions first.

(Ashkboos et al. 2024, arXiv 2401.15024, section 3.) A rotation Q of the residual stream changes nothing: x Q has the
root mean square of x, the projections that read it take W g Q instead of W, where g is the gain of the norm before
them, those that write into it take Q' W, and embedding and head are rotated. Then all but the first D' of D directions
are left out of every weight.

What is ours:

- One rotation for the whole model. The paper's, one for each attention and MLP, needs a matrix Q_l' Q_{l+1} of D' x D'
  on every residual connection, which no ordinary checkpoint has. With 432 of SmolLM2-135M's 576 features these would
  have 11.2 million parameters, of the 12.4 million that slicing saves. So Q has the eigenvectors of the moments of all
  inputs of norms together.
- Inputs count as a norm sees them, x / rms(x), as in the paper; its public code takes the moments of x itself, in which
  attention sinks with their long residuals weigh most. The code's damping of 1 % of the mean eigenvalue is left out: it
  raises all eigenvalues alike and changes no direction. Nor is a mean subtracted from the embedding's rows, as the
  code does for these models too, although an RMSNorm sees that mean.
- The result is an ordinary checkpoint with another `hidden_size`. An RMSNorm over D' features divides their sum of
  squares by D', not D. So the residual stream is x Q sqrt(D' / D), which has x's mean square and leaves epsilon its
  meaning, and the weights that read it are divided by that root. (The public code keeps dividing by D.)

The head has the last norm's gain folded in and the embedding has not, so a tied head becomes a matrix of its own, as in
the paper. A small model with a large vocabulary gets larger by it: SmolLM2-135M has 28 of its 135 million parameters in
the embedding, and with 475 of its 576 features it is as large as with all.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PretrainedConfig

from thesislib.compress.calibration import check_moment
from thesislib.compress.outline import Outline, SizeUnknown
from thesislib.compress.selection import check_dense
from thesislib.compress.stage import Calibrated, Shape, Stage, stage
from thesislib.errors import BadInput
from thesislib.model.blocks import removed_parts, without_parts
from thesislib.model.quantised import quantised_embeddings
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows

# projections that read the residual stream, and the norm whose gain is folded into them
READERS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm")
READERS |= dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm")
WRITERS = ("o_proj", "down_proj")  # into it
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")
RESIDUAL_NORMS = (*BLOCK_NORMS, "norm")  # others are of queries and keys


@stage("slice")
@dataclass(frozen=True)
class Slice(Calibrated):
    """Keep a share of the residual stream's features, after a rotation to its principal directions.

    Attributes:
        keep: the share of the hidden features that is kept, at most: their number is rounded down to a multiple.
        multiple: of which the new number of features is. Where transformers wants one (llama), it is a multiple of the
            number of heads too: SmolLM2-135M, with 576 features and 9 heads, gets 504, 432, 360 ...
    """

    keep: float = 0.75
    multiple: int = 8

    family: ClassVar[str] = "pruned"
    pattern: ClassVar[str] = r"N(\d+(?:\.\d+)?(?:e-\d+)?)%"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise BadInput(f"keep is {self.keep}: expected a share of the hidden features in (0, 1], e.g. 0.75")
        if self.multiple < 1:
            raise BadInput(f"multiple is {self.multiple}: expected at least 1, e.g. 8")

    @property
    def label(self) -> str:
        """N75% if three quarters of the features are kept: the model gets narrower."""
        return f"N{100 * self.keep:g}%"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        return f"{100 * self.keep:g} % of the hidden features kept by slicing"

    @classmethod
    def from_label(cls, part: str) -> "Slice | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return cls(keep=float(match[1]) / 100) if match else None

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: shorter rows; weights that are quantised or have corrections cannot be rotated."""
        if late := next((s for s in previous if s.family == "quantised" or s.leaves_corrections), None):
            raise BadInput(f"{self.label} after {late.label} would rotate weights that it cannot change: put it before")
        if shape is None or self.keep == 1:
            return shape
        # a shape does not tell the heads, and so not the new width: only the other rows are known
        return dataclasses.replace(shape, inputs={n: size for n, size in shape.inputs.items() if n in WRITERS})

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        if outline.budgeted:
            raise SizeUnknown
        config = outline.subject.model.config
        new = empty(outline.subject, narrower(config, self.width(config)))
        outline.subject, outline.changed = Outline(new).subject, set()

    def width(self, config: PretrainedConfig) -> int:
        """The number of features that are kept.

        Raises:
            BadInput: it would be none.
        """
        whole, heads = config.hidden_size, config.num_attention_heads
        if self.keep == 1:
            return whole
        step = math.lcm(self.multiple, heads) if config.model_type == "llama" else self.multiple
        width = int(whole * self.keep + 1e-6) // step * step  # 0.29 x 100 is 28.999999999999996
        if width < 1:
            raise BadInput(
                f"keep {self.keep:g} of {whole} hidden features leaves none: their number is a multiple of {step}, "
                f"expected at least {math.ceil(1e4 * step / whole) / 1e4:g}"
            )
        return width

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The sliced subject, and a report: the features before and after, and the share of the moment in those kept.

        Raises:
            BadInput: a share that leaves no features; weights that are not dense, see
                `thesislib.compress.selection.check_dense`; text that cannot be used.
        """
        width = self.width(subject.model.config)
        check_dense(subject, range(subject.depth), "slice")
        if len({norm.weight.data_ptr() for norm in residual_norms(subject)}) < 2 * subject.depth + 1:
            raise BadInput("a plan that runs a block twice cannot be sliced: its copies would be stored apart")
        if quantised_embeddings(subject.model):
            raise BadInput("the embedding is quantised: slice before quantising")
        ids = self.ids(subject.tokenizer, data)
        check_windows(subject.model, subject.tokenizer, ids)
        values, Q = principal(moment(subject, ids))
        kept = float(values[:width].sum() / values.sum())
        report = {
            "hidden_size": [len(Q), width],
            "kept_energy": kept,
            "untied": subject.model.config.tie_word_embeddings,
        }
        return sliced(subject, Q[:, :width]), report


def moment(subject: Subject, ids: torch.Tensor, batch: int = 4) -> torch.Tensor:
    """The sum of x x' over all tokens and all norms of the residual stream, x divided by its root mean square.

    Args:
        subject: the model.
        ids: (N, T) calibration windows.
        batch: windows at a time.

    Returns:
        (D, D) float64.

    Raises:
        BadInput: activations that are not finite.
    """
    D = subject.model.config.hidden_size
    total = torch.zeros(D, D, dtype=torch.float64, device=subject.device)

    def see(norm: Any, args: tuple[torch.Tensor]) -> None:
        x = args[0].double().flatten(0, -2)  # (B T, D)
        x = x * (x.square().mean(1, keepdim=True) + norm.variance_epsilon).rsqrt()
        total.addmm_(x.T, x)

    hooks = [norm.register_forward_pre_hook(see) for norm in residual_norms(subject)]
    try:
        with torch.no_grad():
            for start in tqdm(range(0, len(ids), batch), desc="moments", unit="batch", disable=None, leave=False):
                subject.model.model(input_ids=ids[start : start + batch].to(subject.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    check_moment(total, "the residual stream", "expected a text that the model reads")
    return total


def residual_norms(subject: Subject) -> list[Any]:
    """The norms that read the residual stream: two of each block, and the last one."""
    return [*(getattr(block, name) for block in subject.blocks for name in BLOCK_NORMS), subject.model.model.norm]


def principal(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvalues of a moment in falling order (D,), and its eigenvectors as columns (D, D).

    Each vector's largest entry is positive, since an eigenvector's sign is the library's choice.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


def narrower(config: PretrainedConfig, width: int) -> PretrainedConfig:
    """A configuration with `width` hidden features and the same heads; its head has a matrix of its own."""
    new: Any = copy.deepcopy(config)
    new.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    new.hidden_size, new.tie_word_embeddings = width, False
    return new


def empty(subject: Subject, config: PretrainedConfig) -> Subject:
    """A subject of another configuration on torch's meta device, without the parts that this one has lost."""
    with torch.device("meta"):
        model: Any = type(subject.model)(config)
    model.to(subject.dtype)
    new = Subject(model, subject.tokenizer, subject.name, subject.plan)
    for part, blocks in removed_parts(subject).items():
        new = without_parts(new, dict.fromkeys(blocks, part))
    return new


def sliced(subject: Subject, Q: torch.Tensor) -> Subject:
    """The subject with x Q sqrt(D' / D) for every x of the residual stream; computed in float64 and rounded once.

    Args:
        subject: not changed; its projections are dense.
        Q: (D, D') float64, orthonormal columns.
    """
    D, width = Q.shape
    scale = (width / D) ** 0.5
    into, out_of = Q * scale, Q / scale
    old: dict[str, torch.Tensor] = subject.model.state_dict()
    new: dict[str, torch.Tensor] = {}
    for key, tensor in old.items():
        path, _, name = key.rpartition(".")
        block, module = path.rsplit(".", 2)[0], path.rpartition(".")[2]
        exact = tensor.double()
        if module in WRITERS:
            exact = into.T @ exact  # a bias too
        elif module in READERS and name == "weight":
            exact = exact * old[f"{block}.{READERS[module]}.weight"].double() @ out_of
        elif module == "lm_head":
            exact = exact * old["model.norm.weight"].double() @ out_of
        elif module == "embed_tokens":
            exact = exact @ into
        elif module in RESIDUAL_NORMS:
            exact = torch.ones(width)
        new[key] = exact.to(tensor)
    out = empty(subject, narrower(subject.model.config, width))
    model: Any = out.model
    model.load_state_dict(new, assign=True)
    model.model.rotary_emb = copy.deepcopy(subject.model.model.rotary_emb)  # it has no weights to load
    model.generation_config = copy.deepcopy(subject.model.generation_config)
    model.requires_grad_(False).eval()
    return out
