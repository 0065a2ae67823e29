"""Draws docs/pictures from the built-in components themselves: ``python docs/tools/make_pictures.py``."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kava_core.data.encoding.encode import encode_text
from kava_core.data.examples import Example, render_example
from kava_core.data.tokenizers import train_tokenizer
from kava_core.kv.align.boundaries import teacher_weights
from kava_core.kv.capture.rotation import rerotate, unrotate
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.fuser import FusionContext
from kava_core.protocols.timeline import Timeline
from kava_core.registry import Registry
from kava_core.specfile.sections.data import Template
from kava_core.specfile.sections.models import TrainTokenizer

FOLDER = Path(__file__).parents[1] / "pictures"
SHADES = "Blues"
BLUE, ORANGE, GREEN = "#1f77b4", "#e6851e", "#3a923a"
RED, PURPLE, GREY = "#c44e52", "#7b5ea7", "#8c8c8c"
EXAMPLE = Example(prompt="Ana had 12 apples and gave Tom 5.", reasoning="12 minus 5 is 7.", answer="7")
TEMPLATE = Template(prompt="{prompt}", reasoning=" {reasoning}", answer=" #{answer}")
TEACHER_TEXTS = (
    "Tom gave 12 apples to Ana.",
    "Ana had 7 apples and Tom had 5.",
    "12 is 7 and 5.",
    "Tom had 12 and gave 5 minus 1.",
)
STUDENT_TEXTS = (
    "Ana had 12 apples and gave Tom 5. 12 minus 5 is 7. #7",
    "An apple had gaps and a map.",
    "Lana had tomatoes, gave 512 plus 75.",
    "A minute and a plane; us and them.",
    "Pandas gave us a dad.",
)
REGISTRY = Registry.build({"*"})


def component(kind: str, name: str, *, teacher: Any = None, student: Geometry, **fields: Any) -> Any:
    """A built-in component, as a spec would have it built."""
    sides = {"teachers": teacher} if kind == "fuser" else {"teacher": teacher}
    return REGISTRY.get(kind, name).model_validate({"name": name, **fields}).build(**sides, student=student)


def geometry(layer: int = 1, head: int = 1, dim: int = 1) -> Geometry:
    """A geometry without queries."""
    return Geometry(layer=layer, head=head, dim=dim, qhead=0, hidden=head * dim)


def random(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def show(axis: Axes, matrix: Tensor, title: str, **labels: Any) -> None:
    """A matrix of weights, white at 0."""
    axis.imshow(matrix.numpy(), cmap=SHADES, vmin=0, vmax=max(float(matrix.max()), 1e-9), aspect="auto")
    axis.set_title(title, fontsize=9)
    axis.set(**labels)
    axis.tick_params(labelsize=7)


def named(axis: Axes, across: str, up: str) -> None:
    """Small axis labels."""
    axis.set_xlabel(across, fontsize=8)
    axis.set_ylabel(up, fontsize=8)


def curve(axis: Axes, title: str, across: str, up: str) -> None:
    """Title, labels and a light grid for lines."""
    axis.set_title(title, fontsize=9)
    named(axis, across, up)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


# Time


def side(kind: Any, vocab_size: int, texts: Sequence[str]) -> tuple[Timeline, list[str]]:
    """The example in a tokenizer trained on ``texts``, and each token's characters."""
    text = render_example(EXAMPLE, TEMPLATE)
    with tempfile.TemporaryDirectory() as cache:
        spec = TrainTokenizer(kind=kind, vocab_size=vocab_size)
        encoded = encode_text(text, train_tokenizer(spec, texts, Path(cache)))
    assert encoded is not None
    batch = {
        "attention_mask": torch.ones(1, len(encoded), dtype=torch.bool),
        "segments": encoded.segments[None],
        "spans": encoded.spans[None],
    }
    words = [text.text[begin:end] for begin, end in encoded.spans.tolist()]
    return Timeline.from_batch(batch), [word.replace(" ", "_") or "<eos>" for word in words]


def time_warpers() -> Figure:
    """Which teacher tokens each student token reads."""
    (student, own), (teacher, theirs) = side("wordpiece", 80, STUDENT_TEXTS), side("bpe", 275, TEACHER_TEXTS)
    panels: list[tuple[str, str, dict[str, Any]]] = [
        ("char_iou", "char_iou: the same characters", {}),
        ("linear", "linear: the whole stretched", {}),
        ("segment", "segment: three parts apart", {}),
        ("segment", "segment, ratio: {reasoning: 0.5}", {"ratio": {"reasoning": 0.5}}),
        ("pad", "pad: equal index", {}),
        ("streaming", "streaming, sinks: 2, window: 8", {"sinks": 2, "window": 8}),
    ]
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    for place, (axis, (name, title, fields)) in enumerate(
        zip(figure.subplots(2, 3).flat, panels, strict=True)
    ):
        warper = component("time_warper", name, teacher=geometry(), student=geometry(), **fields)
        time_map = warper(teacher, student)
        show(axis, time_map.dense(len(theirs))[0], title)
        unread(axis, time_map.valid[0])
        borders(axis, teacher, student)
        axis.set_xticks(
            range(len(theirs)), theirs if place > 2 else [""] * len(theirs), rotation=90, fontsize=7
        )
        axis.set_yticks(range(len(own)), own if place % 3 == 0 else [""] * len(own), fontsize=7)
    figure.supxlabel("teacher's tokens", fontsize=9)
    figure.supylabel("student's tokens", fontsize=9)
    return figure


def unread(axis: Axes, valid: Tensor) -> None:
    """Grey rows: student positions that are not valid, so in no loss."""
    for row in (~valid).nonzero().flatten().tolist():
        axis.axhspan(row - 0.5, row + 0.5, color=GREY, alpha=0.35, linewidth=0)


def borders(axis: Axes, teacher: Timeline, student: Timeline) -> None:
    """Lines between prompt, reasoning and answer."""
    for timeline, line in ((teacher, axis.axvline), (student, axis.axhline)):
        for place in timeline.segments[0].diff().nonzero().flatten().tolist():
            line(place + 0.5, color=ORANGE, linewidth=0.8)


# Layers


def layer_mappers() -> Figure:
    """Weights of 12 teacher layers for 4 student layers."""
    teacher, student = geometry(layer=12), geometry(layer=4)
    panels: list[tuple[str, str, dict[str, Any]]] = [
        ("ratio", "ratio", {}),
        ("ratio", "ratio, sources: 3", {"sources": 3}),
        ("last_aligned", "last_aligned", {}),
        ("learned", "learned, before the first step", {}),
        ("learned", "learned, temperature 0.5", {"temperature": 0.5}),
        ("cka", "cka: the data hold layers 0, 5, 6, 10", {"temperature": 0.05}),
    ]
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    for axis, (name, title, fields) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        mapper = component("layer_mapper", name, teacher=teacher, student=student, **fields)
        if name == "cka":
            measure(mapper)
        show(axis, mapper().detach(), title, xticks=range(12), yticks=range(4))
        written(axis, mapper().detach())
    figure.supxlabel("teacher layer", fontsize=9)
    figure.supylabel("student layer", fontsize=9)
    return figure


def measure(mapper: Any) -> None:
    """A teacher whose layers drift, and a student whose layers are rotations of four of them, with noise."""
    steps = random(0, 12, 400, 24) * 0.6
    teacher = steps.cumsum(0)
    turn, _ = torch.linalg.qr(random(1, 4, 24, 24))
    student = teacher[[0, 5, 6, 10]] @ turn + 0.3 * random(2, 4, 400, 24)
    mapper.observe(teacher[None], student[None], torch.ones(1, 400, dtype=torch.bool))
    mapper.finish()


def written(axis: Axes, matrix: Tensor) -> None:
    """The weights that round to 0.05 or more, as numbers."""
    for i, j in (matrix >= 0.05).nonzero().tolist():
        value = float(matrix[i, j])
        dark = "white" if value > 0.6 * float(matrix.max()) else "black"
        axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color=dark)


# Heads and width


def head_adapters() -> Figure:
    """Mixes of 8 teacher heads for 3 student heads, and the whole map of heads and width."""
    teacher, student = geometry(head=8, dim=8), geometry(head=3, dim=6)
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    mixes, whole = rows
    for axis, init in zip(mixes.subplots(1, 3), ("grouped", "uniform", "random"), strict=True):
        mix = head_mix(init, teacher, student)
        show(axis, mix, f"structured, init: {init}", xticks=range(8), yticks=range(3))
        written(axis, mix)
        named(axis, "teacher head", "student head")
    for axis, name in zip(whole.subplots(1, 2), ("structured", "flat"), strict=True):
        matrix, numbers = whole_map(name, teacher, student)
        show(axis, matrix.abs(), f"{name}, then linear: {numbers} numbers a layer for each part")
        named(axis, "teacher's heads, side by side", "student's heads")
    return figure


def head_mix(init: str, teacher: Geometry, student: Geometry) -> Tensor:
    """The mixing matrix: what the adapter makes of one-hot heads."""
    adapter = component("head_adapter", "structured", teacher=teacher, student=student, init=init)
    heads = torch.eye(teacher.head).view(1, 1, teacher.head, 1, teacher.head)
    return adapter(heads, "keys")[0, 0, :, 0]


def whole_map(name: str, teacher: Geometry, student: Geometry) -> tuple[Tensor, int]:
    """Heads and width together as one matrix, and how many numbers it is made of."""
    adapter = component("head_adapter", name, teacher=teacher, student=student)
    views = {"teacher": adapter.teacher_view, "student": adapter.student_view}
    projector = component("dim_projector", "linear", **views, init="random")
    width = teacher.head * teacher.dim
    one_hot = torch.eye(width).view(1, 1, width, teacher.head, teacher.dim).transpose(2, 3)
    out = projector(adapter(one_hot, "keys"), "keys").detach()
    numbers = projector.keys.numel() + (teacher.head * student.head if name == "structured" else 0)
    return out[0, 0].movedim(1, 0).reshape(width, -1).T, numbers


def dim_projectors() -> Figure:
    """What three projections keep, where it is known what the student holds of the teacher."""
    width, dim, rows = 24, 6, 4000
    spread = torch.logspace(0.6, -0.8, width)
    held = [0, 1, 8, 9, 16, 17]
    x = random(0, rows, width) * spread
    turn, _ = torch.linalg.qr(random(1, dim, dim))
    like = (x / spread)[:, held] @ turn + 0.5 * random(2, rows, dim)
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    bars, errors = figure.subplots(1, 2, width_ratios=(2, 1))
    unexplained = {}
    for place, (method, colour) in enumerate(zip(METHODS, (BLUE, ORANGE, GREEN), strict=True)):
        basis, apply = calibrated(method, x, like)
        read = (basis * spread).norm(dim=0)
        at = torch.arange(width) + 0.27 * (place - 1)
        bars.bar(at.tolist(), (read / read.max()).tolist(), 0.27, color=colour, label=method)
        unexplained[method] = float((apply(x) - like).square().mean() / like.var())
    for place in held:
        bars.axvspan(place - 0.5, place + 0.5, color=GREY, alpha=0.3, linewidth=0)
    curve(
        bars,
        "grey: directions of the teacher that the student holds",
        "direction, by variance",
        "what is read, of the most",
    )
    bars.legend(fontsize=8)
    errors.bar(list(unexplained), list(unexplained.values()), color=(BLUE, ORANGE, GREEN))
    errors.axhline(0.2, color="black", linestyle="--", linewidth=1, label="the noise alone")
    errors.set_yscale("log")
    curve(errors, "squared error on the student's cache", "", "share of its variance")
    errors.legend(fontsize=8)
    return figure


METHODS = ("pca", "procrustes", "ridge")


def calibrated(method: str, x: Tensor, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The matrix that the method finds for these pairs, and the projection."""
    sides = {"teacher": geometry(dim=x.shape[1]), "student": geometry(dim=like.shape[1])}
    projector = component("dim_projector", "calibrated", **sides, method=method)
    valid = torch.ones(1, len(x), dtype=torch.bool)
    for part in ("keys", "values"):
        projector.observe(x[None, None, None], like[None, None, None], valid, part)
    projector.finish()
    return projector.keys_basis[0, 0], lambda rows: projector(rows[None, None, None], "keys")[0, 0, 0]


# Several teachers


NAMES = ("llama", "qwen", "gpt")


def fusers() -> Figure:
    """Shares of three teachers: constants, looks, rewards."""
    figure = Figure(figsize=(10.2, 2.9), layout="constrained")
    panels = {
        "fixed, weights: {llama: 2, qwen: 1, gpt: 1}": fixed_shares(),
        "similarity": similarity_shares(),
        "reinforce, entropy: 0.003": policy(),
    }
    for axis, (title, shares) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        places = range(shares.shape[1])
        axis.stackplot(places, shares.numpy(), labels=NAMES, colors=(BLUE, ORANGE, GREEN), step="mid")
        curve(axis, title, "training pass" if "reinforce" in title else "student position", "share")
        axis.set(xlim=(0, shares.shape[1] - 1), ylim=(0, 1))
    axis.legend(fontsize=8, loc="lower left")
    return figure


def fixed_shares() -> Tensor:
    """2 : 1 : 1, and pieces where a teacher has no counterpart."""
    valid = torch.ones(3, 1, 24, dtype=torch.bool)
    valid[0, 0, 8:14], valid[2, 0, 12:20], valid[:, 0, 21:] = False, False, False
    weights = dict(zip(NAMES, (2.0, 1.0, 1.0), strict=True))
    fuser = component("fuser", "fixed", teacher=NAMES, student=geometry(), weights=weights)
    cache = Cache(keys=torch.zeros(1, 1, 1, 24, 1))
    return teacher_weights(fuser, FusionContext(valid, (cache,) * 3, cache), valid, layer=1)[:, 0, 0]


def similarity_shares() -> Tensor:
    """A student that passes from the mean of the first teacher to that of the second and the third."""
    means = random(6, 3, 1, 1, 1, 1, 16)
    fuser = component("fuser", "similarity", teacher=NAMES, student=geometry(dim=16), temperature=0.3)
    path = torch.linspace(0, 2, 24)
    near = (1 - (path - torch.arange(3)[:, None]).abs()).clamp_min(0)
    student = torch.einsum("kt,kd->td", near, means.view(3, 16)) + 0.3 * random(7, 24, 16)
    valid = torch.ones(3, 1, 24, dtype=torch.bool)
    targets = tuple(Cache(values=mean.expand(1, 1, 1, 24, 16)) for mean in means)
    context = FusionContext(valid, targets, Cache(values=student.view(1, 1, 1, 24, 16)))
    fuser.observe(context)
    fuser.finish()
    return teacher_weights(fuser, context, valid, layer=1)[:, 0, 0]


def policy() -> Tensor:
    """Probabilities while the cross-entropy falls by 0.01, 0.03 or 0.02 a pass, give or take 0.02."""
    torch.manual_seed(8)
    fuser = component("fuser", "reinforce", teacher=NAMES, student=geometry(), entropy=0.003).train()
    optimizer = torch.optim.Adam(fuser.parameters(), lr=0.05)
    noise, weights = 0.02 * random(9, 300), torch.ones(3, 1, 1, 1) / 3
    loss, gain, seen = torch.tensor(9.0), torch.tensor([0.01, 0.03, 0.02]), []
    for wobble in noise:
        drawn = int(fuser.choose().float().argmax())
        fuser.reward(loss + wobble)
        optimizer.zero_grad()
        fuser.penalty(weights).backward()
        optimizer.step()
        loss = loss - gain[drawn]
        seen.append(fuser.logits.softmax(0).detach())
    return torch.stack(seen, 1)


# Losses


def kv_losses() -> Figure:
    """Losses of one target against three changes of the student."""
    target = random(3, 1, 1, 1, 24, 8)
    target = target / target.square().mean(-1, keepdim=True).sqrt()
    planes = random(4, 24, 8, 8)
    angles = [math.radians(degree) for degree in range(0, 181, 5)]
    factors = [step / 20 for step in range(1, 41)]
    common = planes[:1].expand(24, -1, -1)
    panels: list[tuple[str, str, list[float], list[Tensor]]] = [
        ("every vector turned its own way", "angle, °", angles, [turned(target, planes, a) for a in angles]),
        ("every vector times a factor", "factor", factors, [target * f for f in factors]),
        ("all turned alike: another basis", "angle, °", angles, [turned(target, common, a) for a in angles]),
    ]
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, across, at, students) in zip(axes, panels, strict=True):
        places = [math.degrees(one) for one in at] if "°" in across else at
        for name, (colour, style) in LOSSES.items():
            axis.plot(places, losses_of(name, students, target), style, color=colour, label=name)
        curve(axis, title, across, "loss")
        axis.set_ylim(0, 2.2)
    axes[1].legend(fontsize=8, loc="upper center")
    return figure


LOSSES = {
    "mse": (BLUE, "-"),
    "smooth_l1": (ORANGE, "-"),
    "mercator": (GREEN, "--"),
    "relation": (RED, "-"),
    "attention_kl": (PURPLE, "--"),
}


def turned(x: Tensor, planes: Tensor, angle: float) -> Tensor:
    """Every vector turned by an angle: the one at place t by a rotation made of ``planes[t]``."""
    turn, _ = torch.linalg.qr(planes)
    c, s = math.cos(angle), math.sin(angle)
    pair = torch.block_diag(*[torch.tensor([[c, -s], [s, c]])] * (x.shape[-1] // 2))
    return (x[..., None, :] @ (turn @ pair @ turn.mT)).squeeze(-2)


def losses_of(name: str, students: Sequence[Tensor], target: Tensor) -> list[float]:
    """The mean loss of a position for each of the student's states."""
    side = geometry(dim=8).with_(qhead=1)
    parts = ["keys", "queries"] if name == "attention_kl" else ["values"]
    loss = component("kv_loss", name, teacher=side, student=side, parts=parts)
    weight = torch.full((1, 1, target.shape[3]), 1 / target.shape[3])
    caches = [Cache(**dict.fromkeys(parts, one)) for one in (target, *students)]
    return [float(loss(student, caches[0], weight)) for student in caches[1:]]


# Rotation


def rotary() -> Figure:
    """Keys of one content, cached by two models or at two positions."""
    time, dim = 64, 64
    content = random(5, 1, 1, 16, 1, dim).expand(-1, -1, -1, time, -1)
    student, teacher = angles(1e4, torch.arange(time)), angles(5e5, torch.arange(time))
    late = angles(1e4, torch.arange(time) * 3 // 2)
    figure = Figure(figsize=(9.2, 3.1), layout="constrained")
    bases, places = figure.subplots(1, 2, sharey=True)
    for axis, theirs in ((bases, teacher), (places, late)):
        own, cached = rotated(content, student), rotated(content, theirs)
        bare = unrotate(cached, *theirs, apply_rotary_pos_emb)
        axis.plot(cosine(own, cached), color=RED, label="keep")
        axis.plot(cosine(unrotate(own, *student, apply_rotary_pos_emb), bare), color=BLUE, label="strip")
        axis.plot(cosine(own, rotated(bare, student)), "--", color=ORANGE, label="match")
        axis.set_ylim(-0.15, 1.08)
    curve(bases, "bases 1e4 and 5e5, the same positions", "position", "cosine of equal content")
    curve(places, "base 1e4, the teacher's tokens 1.5 times as many", "student's position", "")
    bases.legend(fontsize=8, loc="lower left")
    return figure


def angles(base: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of a Llama with heads of 64 channels."""
    parameters = {"rope_type": "default", "rope_theta": base}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos, sin


def rotated(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """As that model caches it."""
    return rerotate(x, *by, apply_rotary_pos_emb)


def cosine(x: Tensor, y: Tensor) -> list[float]:
    """By position, averaged over heads."""
    similar: list[float] = torch.cosine_similarity(x, y, dim=-1)[0, 0].mean(0).tolist()
    return similar


PICTURES = (time_warpers, layer_mappers, head_adapters, dim_projectors, fusers, kv_losses, rotary)


def main() -> None:
    """Draw every picture."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for draw in PICTURES:
        save(draw(), FOLDER / f"{draw.__name__}.png")


def save(figure: Figure, path: Path) -> None:
    """A PNG of few colours, which makes it small."""
    raw = io.BytesIO()
    figure.savefig(raw, dpi=100)
    Image.open(raw).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
