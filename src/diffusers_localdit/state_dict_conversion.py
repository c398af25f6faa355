"""From the tensors of a released checkpoint to those of `LocalDiTTransformer2DModel`, and back."""

import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .checkpoint_io import CheckpointError, one_line
from .key_mapping import DTYPES, Row, count_layers, key_table, some, unwrap

if TYPE_CHECKING:
    from .transformer_localdit import LocalDiTTransformer2DModel

DEFAULT_WINDOW_SIZE = 4
REPORT_WIDTH = 90

# What the file shows of the global-context branch, and what each wish then comes to. A wish that contradicts the file
# is an error. `none` is refused where the branch is there: the original ran with it, and halved the sum.
WHAT_THE_FILE_SHOWS = {
    "branch": "the file carries the branch",
    "local": "the file carries local bias tables without the branch, so the original ran with it off",
    "nothing": "the file carries nothing of the branch",
}
OUTCOMES = {
    "branch": {"auto": "keep", "keep": "keep", "fold": "fold"},
    "local": {"auto": "none", "none": "none"},
    "nothing": {"auto": "fold", "fold": "fold", "none": "none", "seed": "seed"},
}


class ConversionPlan(NamedTuple):
    """What the names and shapes of a checkpoint say, before any number is read."""

    rows: list[Row]
    config: dict[str, Any]
    shown: str  # a key of OUTCOMES
    outcome: str  # keep, fold, none or seed
    seed: int | None


@dataclass
class ConversionReport:
    """What a conversion did; `str(report)` is meant to be read by people."""

    found_in: str
    kept_keys: int
    dead_keys: int
    dead_numbers: int
    zero_tables: int
    outcome: str  # what became of the global branch: keep, fold, none or seed
    global_context: str
    parameters: int
    dtype: str
    config: dict[str, Any]
    checkpoint: str | None = None
    output: str | None = None
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            ("checkpoint", self.checkpoint),
            ("tensors from", self.found_in),
            ("live keys", f"{self.kept_keys} kept"),
            (
                "dead keys",
                f"{self.dead_keys} dropped ({self.dead_numbers:,} numbers, never computed with)",
            ),
            ("bias tables", f"{self.zero_tables} not in the file, zero" if self.zero_tables else "from the file"),
            ("global context", self.global_context),
            ("parameters", f"{self.parameters:,} in {self.dtype}"),
            ("config", ", ".join(f"{name}={value}" for name, value in self.config.items())),
            *(("remark", remark) for remark in self.remarks),
            ("written to", self.output),
        ]
        return "\n".join(_labelled(label, text) for label, text in lines if text is not None)


def _labelled(label: str, text: str) -> str:
    paragraph = textwrap.wrap(text, width=REPORT_WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{label:<15} " + ("\n" + 16 * " ").join(paragraph)


def convert_state_dict(
    checkpoint: Any,
    window_size: int | None = None,
    sample_size: int = 128,
    use_rope: bool = True,
    global_context: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], ConversionReport]:
    """
    Convert the tensors of an original checkpoint. Where nothing changes they stay views of it, memory mapped if it is.

    Args:
        checkpoint (`Any`):
            What `read_checkpoint` gave: tensors by original name, wrapped or not.
        window_size (`int`, *optional*):
            Side of a window in tokens. By default as the file's bias tables say, or 4 where it has none.
        sample_size (`int`, defaults to `128`):
            Side of the latents trained on (pixels / 8); no file tells it.
        use_rope (`bool`, defaults to `True`):
            Whether the original ran with rotary embedding; no file tells it.
        global_context (`str`, defaults to `"auto"`):
            `"keep"` (the branch is in the file), `"fold"` (put its expected effect, a factor 1/2, into
            `to_out.0.weight` and leave it out), `"none"` (the original ran with it off), `"seed:N"` (initialise it
            under seed `N`, as the original does without one on every load), or `"auto"`: keep if it is there, none if
            only local bias tables are, else fold.
        dtype (`torch.dtype`, *optional*):
            `torch.float32`, `torch.bfloat16` or `torch.float16`. By default as in the file.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, Any], ConversionReport]`: The state dict and configuration of
        `LocalDiTTransformer2DModel`, and what was done.

    Raises:
        `CheckpointError`: Keys are missing or left over, shapes are wrong, live numbers are not finite, an argument
        contradicts the file, or the file is another model's.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype}; expected one of {', '.join(DTYPES.values())}")
    tensors, found_in = unwrap(checkpoint)
    plan = plan_conversion(tensors, window_size, sample_size, use_rope, global_context)
    template = model_without_weights({**plan.config, "use_global_context": True}).state_dict()
    file_dtype = tensors["transformer_blocks.0.attn1.to_qkv.weight"].dtype
    branch = seeded_branch(plan.config, plan.seed, file_dtype) if plan.outcome == "seed" else {}

    state_dict: dict[str, torch.Tensor] = {}
    dead, dropped, zero_tables = [], [], 0
    for row in plan.rows:
        wanted = row.part != "dead" and (plan.config["use_global_context"] or "global_context" not in row.ours[0])
        tensor = tensors.get(row.original, branch.get(row.original))
        if tensor is None:
            if wanted:  # only bias tables get here: `plan_conversion` refuses a file without anything else
                zero_tables += 1
                state_dict |= row.split(torch.zeros(row.join(template).shape, dtype=dtype or file_dtype))
            continue
        _require_shape(row, tensor, template)
        if not wanted:
            (dead if row.part == "dead" else dropped).append(tensor.numel())
            continue
        _require_finite(row.original, tensor)
        if plan.outcome == "fold" and row.original.endswith("attn1.to_out.0.weight"):
            tensor = tensor / 2  # the bias is added after the mean of local and global, and stays
        state_dict |= row.split(_cast(row.original, tensor, dtype))

    report = ConversionReport(
        found_in=found_in,
        kept_keys=len(tensors) - len(dead) - len(dropped),
        dead_keys=len(dead),
        dead_numbers=sum(dead),
        zero_tables=zero_tables,
        outcome=plan.outcome,
        global_context=_explain_global_context(plan, state_dict, sum(dropped)),
        parameters=sum(tensor.numel() for tensor in state_dict.values()),
        dtype=" and ".join(sorted({DTYPES[tensor.dtype] for tensor in state_dict.values()})),
        config=plan.config,
    )
    return state_dict, plan.config, report


def plan_conversion(
    tensors: Mapping[str, torch.Tensor],
    window_size: int | None = None,
    sample_size: int = 128,
    use_rope: bool = True,
    global_context: str = "auto",
) -> ConversionPlan:
    """Decide from names and shapes alone what the model is; arguments and errors as for `convert_state_dict`."""
    _refuse_other_models(tensors)
    num_layers = count_layers(tensors)
    rows = key_table(num_layers)
    leftover = tensors.keys() - {row.original for row in rows}
    missing = [row.original for row in rows if row.part == "body" and row.original not in tensors]
    if leftover:
        raise CheckpointError(f"the file has {len(leftover)} keys that no LocalDiT has: {some(leftover)}")
    if missing:
        raise CheckpointError(f"the file lacks {len(missing)} keys of a LocalDiT: {some(missing)}")
    present = {part: _all_or_none(part, rows, tensors) for part in ("local bias", "global bias", "branch")}
    if present["global bias"] and not present["branch"]:
        raise CheckpointError("the file has the global branch's bias tables but not its weights")
    shown = "branch" if present["branch"] else "local" if present["local bias"] else "nothing"
    outcome, seed = _decide(global_context, shown)

    with_tables = next((part for part in ("local bias", "global bias") if present[part]), None)
    table = next((row.original for row in rows if row.part == with_tables), None)
    config = {
        **_sizes(tensors),
        "num_layers": num_layers,
        "sample_size": sample_size,
        "window_size": _window_size(window_size, None if table is None else _shape(tensors, table, 2)[0]),
        "use_global_context": outcome in ("keep", "seed"),
        "use_rope": use_rope,
    }
    return ConversionPlan(rows, config, shown, outcome, seed)


def _refuse_other_models(names: Mapping[str, Any]) -> None:
    ends = {name.partition(".attn")[2] for name in names}
    if "1.to_q.weight" in ends and not ends & {"1.to_qkv.weight", "1.norm_q.weight"}:
        raise CheckpointError(
            "this is a full-attention PixArt-alpha/Sigma transformer (its self-attention has no to_qkv and no query "
            "and key norms), not a LocalDiT; load it with diffusers' PixArtTransformer2DModel"
        )
    if any(name.startswith("blocks.0.attn.qkv.") for name in names):
        raise CheckpointError(
            "this is a full-attention PixArt-alpha/Sigma model in PixArt's own layout, not a LocalDiT"
        )
    if ".to_q.weight" in ends:
        raise CheckpointError(
            "the file is in the layout of LocalDiTTransformer2DModel already; load its folder with from_pretrained"
        )


def _all_or_none(part: str, rows: list[Row], tensors: Mapping[str, Any]) -> bool:
    names = {row.original for row in rows if row.part == part}
    missing = names - tensors.keys()
    if missing and missing != names:
        raise CheckpointError(f"of the {len(names)} keys of the {part} the file lacks {len(missing)}: {some(missing)}")
    return not missing


def _decide(global_context: str, shown: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(?:auto|keep|fold|none|seed:([0-9]{1,19}))", global_context)
    if match is None:
        raise CheckpointError(f"global context is {global_context!r}; expected auto, keep, fold, none or seed:N")
    wish = global_context.partition(":")[0]
    if wish not in OUTCOMES[shown]:
        raise CheckpointError(
            f"global context {global_context!r} contradicts the file: {WHAT_THE_FILE_SHOWS[shown]}; possible here: "
            + ", ".join("seed:N" if name == "seed" else name for name in OUTCOMES[shown])
        )
    return OUTCOMES[shown][wish], None if match[1] is None else int(match[1])


def _shape(tensors: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}; expected {dimensions} dimensions, none of them empty")
    return shape


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    width, in_channels, patch_size, _ = _shape(tensors, "pos_embed.proj.weight", 4)
    (head_dim,) = _shape(tensors, "transformer_blocks.0.attn1.norm_q.weight", 1)
    if width % head_dim != 0:
        raise CheckpointError(f"the width {width} is no multiple of the head size {head_dim} (length of attn1.norm_q)")
    return {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": _shape(tensors, "proj_out.weight", 2)[0] // patch_size**2,
        "patch_size": patch_size,
        "caption_channels": _shape(tensors, "caption_projection.linear_1.weight", 2)[1],
    }


def _window_size(window_size: int | None, table_rows: int | None) -> int:
    if table_rows is None:
        return DEFAULT_WINDOW_SIZE if window_size is None else window_size
    side = math.isqrt(table_rows)
    if side * side != table_rows or side % 2 == 0:
        raise CheckpointError(f"the bias tables have {table_rows} rows; expected (2 * window size - 1) squared")
    if window_size not in (None, (side + 1) // 2):
        raise CheckpointError(
            f"window size {window_size} contradicts the file's bias tables, which are for {(side + 1) // 2}"
        )
    return (side + 1) // 2


def model_without_weights(config: Mapping[str, Any]) -> "LocalDiTTransformer2DModel":
    """The model on the meta device; a `CheckpointError` if there is no such model."""
    from .transformer_localdit import LocalDiTTransformer2DModel

    try:
        with torch.device("meta"):
            return LocalDiTTransformer2DModel(**config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the sizes make no LocalDiT: {one_line(error)}") from error


def _require_shape(row: Row, tensor: torch.Tensor, template: Mapping[str, torch.Tensor]) -> None:
    expected = row.join(template).shape
    if tensor.shape != expected:
        raise CheckpointError(f"{row.original} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")


def _require_finite(name: str, tensor: torch.Tensor, why: str = "") -> None:
    finite = tensor.isfinite()
    if not finite.all():
        raise CheckpointError(f"{name} has {int((~finite).sum()):,} numbers that are NaN or infinite{why}")


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor
    tensor = tensor.to(dtype)
    _require_finite(name, tensor, why=f" as {DTYPES[dtype]}; choose bfloat16 or float32")
    return tensor


def seeded_branch(config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    Initialise the global branch as the original does when it builds its processors, under a seed.

    Args:
        config (`Mapping[str, Any]`):
            Configuration of the model.
        seed (`int`):
            Seed of PyTorch's CPU generator. The caller's random state is left as it was.
        dtype (`torch.dtype`):
            Type of the result; drawn in float32.

    Returns:
        `dict[str, torch.Tensor]`: The branch of every layer by original name.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    options = {"device": "cpu", "dtype": torch.float32}
    branch: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for layer in range(config["num_layers"]):
            modules = {"to_global_kv": nn.Linear(width, 2 * width, **options)}  # order is the original's
            for stage in (0, 1):
                convolution = f"query_feat_extract.{stage}.conv"
                modules |= {
                    f"{convolution}.0": nn.Conv2d(width, width, 3, groups=width, bias=False, **options),
                    f"{convolution}.2.fc.0": nn.Linear(width, width // 4, bias=False, **options),
                    f"{convolution}.2.fc.2": nn.Linear(width // 4, width, bias=False, **options),
                    f"{convolution}.3": nn.Conv2d(width, width, 1, bias=False, **options),
                }
            for name, module in modules.items():
                for end, parameter in module.named_parameters():
                    key = f"transformer_blocks.{layer}.attn1.processor.{name}.{end}"
                    branch[key] = parameter.detach().to(dtype)
    return branch


def _explain_global_context(plan: ConversionPlan, state_dict: Mapping[str, torch.Tensor], dropped: int) -> str:
    numbers = sum(tensor.numel() for name, tensor in state_dict.items() if ".global_context." in name)
    shown = WHAT_THE_FILE_SHOWS[plan.shown]
    half = "half of attn1.to_out.0.weight stands for the mean of local and global"
    if plan.outcome == "keep":
        return f"kept ({numbers:,} numbers): {shown}"
    if plan.outcome == "seed":
        return f"drawn with seed {plan.seed} ({numbers:,} numbers, never trained): {shown}"
    if plan.outcome == "fold" and plan.shown == "branch":
        return f"folded as asked: {shown}; its {dropped:,} numbers are discarded, so outputs differ, and {half}"
    if plan.outcome == "fold":
        return f"folded: {shown}, which the original then draws at random on every load; {half}"
    if plan.shown == "local":
        return f"off: {shown}; exact"
    return f"off as asked: {shown} and cannot show whether the original ran with it"


def original_state_dict(state_dict: Mapping[str, torch.Tensor], folded: bool = False) -> dict[str, torch.Tensor]:
    """
    Write a state dict of `LocalDiTTransformer2DModel` in the original's layout, dead tensors included.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            The model's state dict, projections not fused.
        folded (`bool`, defaults to `False`):
            Undo a fold: double `to_out.0.weight` and leave the bias tables out, as in the file that was folded.

    Returns:
        `dict[str, torch.Tensor]`: Tensors by original name. Without the branch the local bias tables alone are there,
        which tells the original that it is off.

    Raises:
        `CheckpointError`: Keys are missing or left over.
    """
    has_branch = any(".global_context." in name for name in state_dict)
    rows = [
        row
        for row in key_table(count_layers(state_dict))
        if row.part in ("body", "dead")
        or (row.part == "local bias" and not folded)
        or (row.part in ("global bias", "branch") and has_branch)
    ]
    expected = {name for row in rows for name in row.ours}
    if missing := expected - state_dict.keys():
        raise CheckpointError(f"the model lacks {len(missing)} keys: {some(missing)}")
    ignored = {name for name in state_dict if folded and name.endswith(".attn.rel_pos_bias")}
    if leftover := state_dict.keys() - expected - ignored:
        raise CheckpointError(f"the original has no place for {len(leftover)} keys: {some(leftover)}")
    original = {row.original: row.join(state_dict) for row in rows}
    for name in original:
        if folded and name.endswith("attn1.to_out.0.weight"):
            original[name] = original[name] * 2
    return original
