"""The plans of Franken-LLaMA: orders of a model's blocks, in which some are skipped and some repeated.

A plan is a tuple of block indices in the order in which they run. As text it is a list of terms, such as
`0-6x2,10,12-29`. A term is `7`, `0-6` (both ends run) or `0-29:2` (every second block of these); with `x3` behind it
each block runs three times in a row.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence

from thesislib.errors import BadInput, shown
from thesislib.model.blocks import LONGEST, Plan, check_plan

ORIGINAL_DEPTH = 32


def parse_plan(text: str, depth: int) -> Plan:
    """The plan of a text, for a model of `depth` blocks.

    >>> parse_plan("0-2x2,5-9:2", depth=10)
    (0, 0, 1, 1, 2, 2, 5, 7, 9)

    Raises:
        BadInput: a term of another form, an empty plan, or an index out of range.
    """
    plan: list[int] = []
    for term in filter(None, (t.strip() for t in str(text).split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?(?:x(\d+))?", term, re.ASCII)
        if not match or max(map(len, filter(None, match.groups()))) > 18:
            raise BadInput(f"plan term {shown(term)} is not understood: expected e.g. '7', '0-6', '0-29:2' or '0-6x3'")
        first, last, step, times = (int(g) if g else None for g in match.groups())
        last, step, times = first if last is None else last, 1 if step is None else step, 1 if times is None else times
        if last < first or step < 1 or times < 1:
            raise BadInput(
                f"plan term '{term}' runs no block: expected a range that ascends, a step and a repeat of at least 1"
            )
        # checked before all blocks are listed: among the first depth + 1 is one out of range, if any is
        check_plan(range(first, last + 1, step)[: depth + 1], depth)
        if len(plan) + times * ((last - first) // step + 1) > LONGEST:
            raise BadInput(f"plan term '{term}' makes a plan of more than {LONGEST:,} blocks: expected fewer")
        plan += [block for block in range(first, last + 1, step) for _ in range(times)]
    return check_plan(plan, depth)


def format_plan(plan: Sequence[int]) -> str:
    """The shortest text without steps that `parse_plan` reads as this plan.

    >>> format_plan((0, 1, 2, 2, 3, 3, 9))
    '0-1,2-3x2,9'
    """
    runs = [(block, len(list(same))) for block, same in itertools.groupby(plan)]
    terms, i = [], 0
    while i < len(runs):
        (first, times), j = runs[i], i + 1
        while j < len(runs) and runs[j] == (first + j - i, times):
            j += 1
        terms.append(f"{first}" + (f"-{first + j - i - 1}" if j - i > 1 else "") + (f"x{times}" if times > 1 else ""))
        i = j
    return ",".join(terms)


def plan_in_words(plan: Sequence[int], depth: int) -> str:
    """What a plan does to a model of `depth` blocks; one that only skips and repeats, in ascending order.

    >>> plan_in_words((0, 1, 2, 2, 5, 6, 7, 8, 9), depth=10)
    'without 3-4; 2 twice'
    """
    kept, times = sorted(set(plan)), Counter(plan)
    step = kept[1] - kept[0] if len(kept) > 1 else 1
    if len(kept) == depth:
        said = "all blocks"
    elif step > 1 and kept == list(range(kept[0], depth, step)) and kept[0] < step:
        said = f"every {'2nd' if step == 2 else '3rd' if step == 3 else f'{step}th'} block, from {kept[0]}"
    elif 2 * len(kept) >= depth:
        said = f"without {_spaced(sorted(set(range(depth)) - set(kept)))}"
    else:
        said = f"only {_spaced(kept)}"
    whom = "all others" if said.startswith("without") else "each"
    for count in sorted(set(times.values()) - {1}):
        often = "twice" if count == 2 else f"{count} times"
        again = [block for block in kept if times[block] == count]
        said += f", {whom} {often}" if again == kept else f"; {_spaced(again)} {often}"
    return said


def _spaced(blocks: Sequence[int]) -> str:
    return format_plan(blocks).replace(",", ", ")


# The configurations of the original study (AngeloGalav/franken-llama, configurations.py) on the 32 blocks of
# Llama-2-7B-chat: name: (blocks skipped, blocks repeated, how often). Two follow their names, unlike its file:
# there "0_7_15_23_31" ran every fourth block, and "skip_every_2_layers_r2" repeated none.
_ORIGINAL: dict[str, tuple[str, str, int]] = {
    "baseline": ("", "", 1),
    "0-7": ("8-31", "", 1),
    "23-31r3": ("0-22", "23-31", 3),
    "0_7_15_23_31": ("1-6,8-14,16-22,24-30", "", 1),
    "11-19": ("0-10,20-31", "", 1),
    "15r3_23r3_31r3": ("0-14,16-22,24-30", "15,23,31", 3),
    "0-3_28-31": ("4-27", "", 1),
    "0-7r3": ("8-31", "0-7", 3),
    "9-19r2": ("0-8,20-31", "9-19", 2),
    "27-31r5": ("0-26", "27-31", 5),
    "0r2_7r2_15r2_23r2_31r2": ("1-6,8-14,16-22,24-30", "0,7,15,23,31", 2),
    "0-23_27-31": ("24-26", "", 1),
    "15_single_skip": ("15", "", 1),
    "last_two_only": ("0-29", "", 1),
    "only_even_layers": ("1-31:2", "", 1),
    "only_odd_layers": ("0-30:2", "", 1),
    "first_last_8r2": ("8-23", "0-7,24-31", 2),
    "first_last_2_with_skips": ("15-16,24-25", "0,31", 2),
    "mid_expansion_with_repeats": ("6-9,25-28", "14-18", 2),
    "2_3rd_of_llama": ("11-20", "", 1),
    "2_3rds_plus_llama": ("11-19:2", "", 1),
    "skip_every_2_layers": ("1-31:3,2-31:3", "", 1),
    "skip_every_2_layers_r2": ("1-31:3,2-31:3", "0-31:3", 2),
    "skip_near_end_keep_last_two": ("27-29", "", 1),
    "essential_layers_with_final_repeats": ("10-25", "30-31", 2),
}
# (first block, step) of plans with every second or third block of the model
_STRIDES = {"only_even_layers": (0, 2), "only_odd_layers": (1, 2)}
_STRIDES |= dict.fromkeys(("skip_every_2_layers", "skip_every_2_layers_r2"), (0, 3))


def franken_plans(depth: int) -> dict[str, Plan]:
    """The 25 configurations of the original study, scaled from its 32 blocks to `depth`.

    A plan cuts the 32 blocks into runs of neighbours that are treated alike (skipped, run once, run n times). Runs keep
    their order and their share of the depth: a boundary at b of 32 moves to b * depth / 32, rounded half up, or as
    little further as every run needs to keep one block. A plan of every second or third block stays one. At depth 32
    the plans are the original ones.

    Raises:
        BadInput: fewer blocks than the plan with the most runs has runs.
    """
    plans = {}
    most = max(len(_runs(*settings)) for name, settings in _ORIGINAL.items() if name not in _STRIDES)
    if depth < most:
        raise BadInput(
            f"the {len(_ORIGINAL)} plans need a model of at least {most} blocks, a block for each run that they "
            f"treat alike: this one has {depth}"
        )
    for name, (skipped, repeated, times) in _ORIGINAL.items():
        if name in _STRIDES:
            start, step = _STRIDES[name]
            plans[name] = tuple(b for b in range(start, depth, step) for _ in range(times))
            continue
        runs = _runs(skipped, repeated, times)
        edges = _scaled(list(itertools.accumulate(length for _, length in runs)), depth)
        plan: list[int] = []
        for (t, _), start, end in zip(runs, [0, *edges], edges, strict=False):
            plan += [b for b in range(start, end) for _ in range(t)]
        plans[name] = tuple(plan)
    return plans


def _runs(skipped: str, repeated: str, times: int) -> list[tuple[int, int]]:
    """A plan's runs of neighbours that are treated alike: (how often each block runs, how many blocks), of 32."""
    often = dict.fromkeys(range(ORIGINAL_DEPTH), 1)
    for blocks, count in ((repeated, times), (skipped, 0)):
        often |= dict.fromkeys(parse_plan(blocks, ORIGINAL_DEPTH) if blocks else (), count)
    return [(count, len(list(same))) for count, same in itertools.groupby(often.values())]


def _scaled(boundaries: list[int], depth: int) -> list[int]:
    """The ends of runs on 32 blocks, scaled to `depth` so that every run keeps at least one block."""
    ends: list[int] = []
    for k, boundary in enumerate(boundaries):
        wanted = (2 * boundary * depth + ORIGINAL_DEPTH) // (2 * ORIGINAL_DEPTH)
        room = depth - (len(boundaries) - 1 - k)
        ends.append(min(max(wanted, (ends[-1] if ends else 0) + 1), room))
    return ends
