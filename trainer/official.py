"""Checkpoints of the official ActionFormer code, `epoch_034.pth.tar` and the like, under the names used here.

Only tensors and plain values are read; nothing is unpickled into code.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import DataError
from engine.schema import nearest
from trainer.build import CHECKPOINT, CONFIG, refuse_trained
from trainer.offline import OfflineDetector
from trainer.recipe import read_recipe, recipe_text

log = logging.getLogger(__name__)

EMA, PLAIN = "state_dict_ema", "state_dict"


def load_official(config: Path | str, checkpoint: Path | str, *, ema: bool = True) -> OfflineDetector:
    """The detector of an official configuration with the weights of an official checkpoint, for inference.

    `ema`: the averaged weights, which the official evaluation takes, where the checkpoint has them.
    Raises ConfigError for a configuration, DataError for a checkpoint that cannot be used.
    """
    recipe = read_recipe(Path(config))
    states = read_official(Path(checkpoint))
    state = states[EMA] if ema and EMA in states else states[PLAIN]
    detector = OfflineDetector(recipe)
    fill(detector, _renamed_from(state, Path(checkpoint)), Path(checkpoint))
    return detector.eval().requires_grad_(False)


def import_official(config: Path, checkpoint: Path, run: Path, *, ema: bool = True) -> None:
    """Make a run of an official configuration and checkpoint. Raises ConfigError where `run` has one."""
    refuse_trained(run, "give another --output")
    detector = load_official(config, checkpoint, ema=ema)
    states = {name: value.clone() for name, value in detector.state_dict().items()}
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG).write_text(recipe_text(detector.recipe), encoding="utf-8")
    content = {"step": 0, "data": {"imported": checkpoint.name}, "model": states, "ema": states}
    torch.save(content, run / CHECKPOINT)
    if detector.recipe.dataset.json_file is None or not detector.recipe.dataset.feat_folder:
        log.warning("%s: to evaluate, set `dataset.json_file` and `dataset.feat_folder`", run / CONFIG)


def read_official(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a checkpoint: `state_dict`, and `state_dict_ema` where it has one."""
    try:
        content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError as problem:
        raise DataError(f"{checkpoint}: cannot be opened: {problem.strerror or problem}") from None
    except Exception as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise DataError(
            f"{checkpoint}: not readable as tensors and plain values, and nothing else is unpickled: {reason}"
        ) from None
    if isinstance(content, dict) and content.get(PLAIN) is None and EMA in content:
        content = {**content, PLAIN: content[EMA]}
    if not isinstance(content, dict) or not isinstance(content.get(PLAIN), dict):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{checkpoint}: found {found[:200]}; expected `{PLAIN}` or `{EMA}`, as the official code saves"
        )
    states = {key: content[key] for key in (PLAIN, EMA) if isinstance(content.get(key), dict)}
    for key, state in states.items():
        wrong = [name for name, value in state.items() if not _is_plain(name, value)]
        if wrong:
            raise DataError(f"{checkpoint}: `{key}.{wrong[0]}` is not a tensor of numbers under a name")
        bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise DataError(f"{checkpoint}: `{key}.{bad[0]}` holds NaN or Inf")
    return states


def _is_plain(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )


def _renamed_from(state: dict[str, Tensor], origin: Path) -> dict[str, Tensor]:
    try:
        return renamed(state)
    except (RuntimeError, IndexError, ValueError) as problem:
        raise DataError(f"{origin}: not weights of the official code: {problem}") from None


def fill(detector: OfflineDetector, state: dict[str, Tensor], origin: Path) -> None:
    """Load `state` into `detector`; DataError tells which key of the configuration may not fit."""
    own = detector.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unknown or other:
        parts = []
        if other:
            key = sorted(other)[0]
            parts.append(
                f"`{key}` is {tuple(state[key].shape)}, the configuration makes {tuple(own[key].shape)}"
            )
        if missing:
            parts.append(f"it lacks {len(missing)} tensors (`{missing[0]}`)")
        if unknown:
            hint = nearest(unknown[0], missing) if missing else ""
            parts.append(f"it has {len(unknown)} that the configuration does not (`{unknown[0]}`{hint})")
        raise DataError(
            f"{origin}: does not fit the configuration: {'; '.join(parts)}; give the one that trained it "
            "(`model`, `dataset.input_dim`, `dataset.num_classes`, `train_cfg.droppath`)"
        )
    detector.load_state_dict(state)


_NAMES = (
    ("backbone.embd_norm.", "backbone.embed_norm."),
    ("backbone.embd.", "backbone.embed."),
    (".attn.rel_pe", ".attention.bias"),
    (".attn.", ".attention."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".drop_path_attn.", ".path1."),
    (".drop_path_mlp.", ".path2."),
    ("neck.fpn_norms.", "neck.norms."),
    ("neck.fpn_convs.", "neck.convs."),
    ("neck.lateral_convs.", "neck.laterals."),
    ("cls_head.cls_head.", "classify.out."),
    ("reg_head.offset_head.", "regress.out."),
    ("cls_head.head.", "classify.convs."),
    ("reg_head.head.", "regress.convs."),
    ("cls_head.norm.", "classify.norms."),
    ("reg_head.norm.", "regress.norms."),
    (".conv.weight", ".weight"),
    (".conv.bias", ".bias"),
)
_DEPTHWISE = ("query_conv.conv.weight", "key_conv.conv.weight", "value_conv.conv.weight")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under the names used here.

    Convolutions turn from [out, in, kernel] to [kernel * in, out], depthwise ones from [D, 1, kernel] to
    [kernel, D], norms and scales from [1, D, 1] to [D]; the bias of relative positions [1, 1, H, window],
    which runs from the past to the future there, is [H, window] and runs back here.
    """
    result: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for key, value in state.items():
        official = key.removeprefix("module.")
        if official.startswith("reg_head.scale."):
            scales[int(official.split(".")[2])] = value
            continue
        name = official
        for old, new in _NAMES:
            name = name.replace(old, new)
        if official.endswith(_DEPTHWISE) or ("fpn_convs." in official and value.ndim == 3):
            value = value[:, 0].T
        elif official.endswith("rel_pe"):
            value = value[0, 0].flip(-1)
        elif official.endswith(".conv.weight"):
            value = value.permute(2, 1, 0).reshape(-1, value.shape[0])
        elif value.ndim == 3 and value.shape[0] == 1 and value.shape[2] == 1 and not _is_linear(official):
            value = value[0, :, 0]
        elif value.ndim == 3:
            value = value[:, :, 0]
        result[name] = value.detach().clone().contiguous()
    if len(result) + len(scales) != len(state):
        raise ValueError("two tensors have one name, with and without `module.`")
    if sorted(scales) != list(range(len(scales))):
        raise ValueError(f"scales of the levels {sorted(scales)}, expected one for each")
    if scales:
        result["scale"] = (
            torch.stack([scales[level] for level in sorted(scales)]).reshape(-1).detach().clone()
        )
    return result


def _is_linear(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] == "weight" and (parts[-2] in ("query", "key", "value", "proj") or parts[-3] == "mlp")
