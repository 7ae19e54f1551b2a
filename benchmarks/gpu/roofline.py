"""FLOP and bytes of one training step on paper, and the time that a card needs for them at least.

`python -m benchmarks.gpu roofline --shape llama-3-8b --tokens 4096` prints the table of docs/gpu.md.

A product of a (tokens, k) and a (k, n) matrix counts 2 * tokens * k * n FLOP. In the backward pass a frozen weight
needs the gradient of its input (the same number again), a trained one also that of itself (twice the number). Bytes
are those that have to pass through the card's memory if each operation reads its inputs and writes its output once
and nothing stays in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.shapes import Shape

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Card:
    """Peak rates of a card: dense bf16 FLOP/s, and bytes/s of its memory (data sheets)."""

    name: str
    flops: float
    bandwidth: float


CARDS = {
    "h100": Card("H100 SXM", 989e12, 3.35e12),
    "h200": Card("H200", 989e12, 4.8e12),
    "a100": Card("A100 SXM 80 GB", 312e12, 2.04e12),
    "rtx4090": Card("RTX 4090", 165e12, 1.01e12),
}


@dataclass(frozen=True)
class Part:
    """One kind of operation in a step: its FLOP, its bytes, and what runs it."""

    name: str
    flop: float
    bytes: float
    kernel: str

    def seconds(self, card: Card) -> float:
        """Return the shortest time on a card."""
        return max(self.flop / card.flops, self.bytes / card.bandwidth)

    def bound(self, card: Card) -> str:
        """Return what limits it."""
        return "compute" if self.flop / card.flops > self.bytes / card.bandwidth else "memory"


def linear_sizes(shape: Shape) -> list[tuple[int, int, int]]:
    """Return (inputs, outputs, how many) of the linear layers of the model, without the head."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    gate = 2 if shape.model_type.startswith("qwen3_5") else 1  # its attention has an output gate beside the queries
    attention = [(shape.hidden, queries * gate, 1), (shape.hidden, keys, 2), (queries, shape.hidden, 1)]
    mlp = [(shape.hidden, shape.inner, 2), (shape.inner, shape.hidden, 1)]
    key_width = shape.delta_key_heads * shape.delta_head_dim
    value_width = shape.delta_value_heads * shape.delta_head_dim
    delta = [
        (shape.hidden, 2 * key_width + value_width, 1),
        (shape.hidden, value_width, 1),
        (shape.hidden, shape.delta_value_heads, 2),
        (value_width, shape.hidden, 1),
    ]
    full = [(width, out, count * shape.attention_layers) for width, out, count in attention]
    delta_layers = shape.layers - shape.attention_layers
    return (
        full
        + [(width, out, count * shape.layers) for width, out, count in mlp]
        + [(width, out, count * delta_layers) for width, out, count in delta if delta_layers]
    )


def step_parts(
    shape: Shape,
    tokens: int,
    document: int,
    method: str = "lora",
    rank: int = 16,
    supervised: float = 1.0,
    checkpointing: bool = False,
) -> list[Part]:
    """Return the parts of one step, in the order of the model.

    Args:
        shape: The model.
        tokens: Tokens of the step.
        document: Length of the documents that attention is computed in.
        method: lora, qlora or full.
        rank: Of the LoRA matrices.
        supervised: Share of tokens with a target.
        checkpointing: Whether layers are computed a second time in the backward pass.
    """
    again = 1 if checkpointing else 0
    weights = sum(width * out * count for width, out, count in linear_sizes(shape))
    ends = sum((width + out) * count for width, out, count in linear_sizes(shape))
    passes = 2 + again if method != "full" else 3 + again
    parts = []
    linear_bytes = BF16 * (weights + tokens * ends) * passes
    parts.append(Part("linear layers", 2.0 * tokens * weights * passes, linear_bytes, "cuBLAS bf16"))
    if method == "qlora":
        # 4 bits and one 8-bit scale per 64 weights are read, and the weights written in bf16, in every pass
        parts.append(Part("dequantize", 0.0, weights * passes * (0.5 + 1 / 64 + BF16), "bitsandbytes nf4"))
    if method != "full":
        flop = 2.0 * tokens * rank * ends * (3 + again)
        parts.append(Part("LoRA matrices", flop, BF16 * tokens * ends * (2 + again), "cuBLAS, one autograd operation"))
    pairs = tokens * document / 2
    attention_flop = 4.0 * pairs * shape.heads * shape.head_dim * shape.attention_layers * (3.5 + again)
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    parts.append(
        Part(
            "attention",
            attention_flop,
            BF16 * tokens * heads * shape.attention_layers * (3 + again),
            "torch varlen or Flash Attention",
        )
    )
    delta_layers = shape.layers - shape.attention_layers
    if delta_layers:
        width = shape.delta_value_heads * shape.delta_head_dim
        # chunked delta rule: some six products with the state of head_dim by head_dim per token and head
        flop = 2.0 * tokens * width * shape.delta_head_dim * 6 * delta_layers * (3 + again)
        parts.append(
            Part(
                "gated delta rule",
                flop,
                BF16 * tokens * width * 8 * delta_layers * (2 + again),
                "fla or chunks in torch",
            )
        )
    # 2 norms, 2 residual sums, rotary and SwiGLU: reads and writes forward, twice as much backward
    pointwise = (2 * 2 + 2 * 3) * shape.hidden + 3 * shape.inner + 2 * heads
    parts.append(
        Part(
            "norms, SwiGLU, residuals",
            0.0,
            BF16 * tokens * pointwise * shape.layers * (3 + again),
            "fused layers or Liger",
        )
    )
    targets = tokens * supervised
    head = shape.hidden * shape.vocabulary
    head_passes = 2 if method != "full" else 3
    logits = targets * shape.vocabulary
    parts.append(
        Part(
            "head and cross entropy",
            2.0 * targets * head * head_passes,
            BF16 * head * head_passes + (BF16 + FP32) * logits * 2,
            "cuBLAS, cross entropy in chunks",
        )
    )
    trained = weights + head * (1 if shape.tied else 2) if method == "full" else rank * ends
    # AdamW in fp32: weight, gradient and two moments read, weight and moments written
    parts.append(Part("AdamW", 10.0 * trained, FP32 * 7 * trained, "torch fused AdamW"))
    return parts


def model_flop(shape: Shape, tokens: int, document: int, method: str, rank: int = 16) -> float:
    """Return the FLOP that a step needs, without recomputation: the numerator of MFU."""
    return sum(part.flop for part in step_parts(shape, tokens, document, method, rank))


def table(shape: Shape, card: Card, tokens: int, document: int, method: str, rank: int, checkpointing: bool) -> str:
    """Return the parts of a step as a Markdown table, with the sum and the highest share of the peak."""
    parts = step_parts(shape, tokens, document, method, rank, checkpointing=checkpointing)
    total = sum(part.seconds(card) for part in parts)
    lines = [
        f"{method}, {tokens} tokens in documents of {document}, {card.name}:",
        "",
        "| part | TFLOP | GB | at least, ms | share | bound by | kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in parts:
        seconds = part.seconds(card)
        lines.append(
            f"| {part.name} | {part.flop / 1e12:.1f} | {part.bytes / 1e9:.1f} | {seconds * 1e3:.1f} | "
            f"{seconds / total:.0%} | {part.bound(card)} | {part.kernel} |"
        )
    useful = model_flop(shape, tokens, document, method, rank)
    lines += [
        "",
        f"sum: {total * 1e3:.0f} ms, {tokens / total:,.0f} tokens/s, {useful / total / 1e12:.0f} TFLOP/s, "
        f"{useful / total / card.flops:.0%} of the bf16 peak.",
    ]
    return "\n".join(lines)
