"""Which ends of a module's path mean what: one table, read by the longest end that is in it.

A row of `_ROWS` is a kind, with a side before it where the end itself tells the stack
("vision.projection"), and the ends of the paths of modules that are of it. Numbers in a path stand
as "#". The layer is the first number that counts layers (`_STACKS`), else the first that counts no
experts. The side is what the path's other words say (`SIDE_WORDS`), else the row's, else "decoder".

A user's table is the other way round, {end of a path: kind}, and goes before this one:

    lf.roles(model, tables={"mixer.wq": "attention.query", "patchify": "vision.embedding.patch"})

Given up: what a path cannot tell. That `fc1` feeds the activation and `fc2` leads back is a habit
of names; a model that breaks it needs a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..errors import MismatchError
from ..words import one_line
from .role import SIDES, Role

_ROWS = {
    "attention.query": """q_proj attention.self.query attention.attention.query attn.q q_lin
        SelfAttention.q attention.wq""",
    "attention.key": """k_proj attention.self.key attention.attention.key attn.k k_lin
        SelfAttention.k attention.wk""",
    "attention.value": """v_proj attention.self.value attention.attention.value attn.v v_lin
        SelfAttention.v attention.wv""",
    "attention.output": """o_proj out_proj attention.output.dense attn.o out_lin SelfAttention.o
        attention.wo attention.dense self_attention.dense attn.c_proj""",
    "attention.qkv": "qkv_proj query_key_value c_attn Wqkv attn.qkv",
    "attention.position": "relative_attention_bias",
    "cross.query": """encoder_attn.q_proj EncDecAttention.q crossattention.q_attn
        crossattention.self.query cross_attn.q_proj""",
    "cross.key": """encoder_attn.k_proj EncDecAttention.k crossattention.self.key
        cross_attn.k_proj""",
    "cross.value": """encoder_attn.v_proj EncDecAttention.v crossattention.self.value
        cross_attn.v_proj""",
    "cross.output": """encoder_attn.out_proj EncDecAttention.o crossattention.c_proj
        crossattention.output.dense cross_attn.o_proj cross_attn.out_proj""",
    "cross.kv": "crossattention.c_attn",
    "mlp.up": """up_proj fc1 c_fc fc_in dense_h_to_4h intermediate.dense ffn.lin1
        DenseReluDense.wi DenseReluDense.wi_1 feed_forward.w3""",
    "mlp.gate": "gate_proj DenseReluDense.wi_0 feed_forward.w1",
    "mlp.down": """down_proj fc2 mlp.c_proj fc_out dense_4h_to_h output.dense ffn.lin2
        DenseReluDense.wo feed_forward.w2""",
    "mlp.gate_up": "gate_up_proj",
    "experts.up": "experts.#.up_proj experts.#.w3",
    "experts.gate": "experts.#.gate_proj experts.#.w1",
    "experts.down": "experts.#.down_proj experts.#.w2 experts.down_proj",
    "experts.gate_up": "experts.gate_up_proj experts.#.gate_up_proj",
    "experts.router": "mlp.gate block_sparse_moe.gate mlp.router router",
    "shared.up": "shared_expert.up_proj shared_experts.up_proj",
    "shared.gate": "shared_expert.gate_proj shared_experts.gate_proj",
    "shared.down": "shared_expert.down_proj shared_experts.down_proj",
    "shared.router": "shared_expert_gate",
    "embedding": "embed_tokens wte embed_in word_embeddings token_embedding tok_embeddings shared",
    "encoder.embedding": "embeddings.word_embeddings",
    "embedding.position": "wpe embed_positions position_embedding",
    "encoder.embedding.position": "embeddings.position_embeddings",
    "encoder.embedding.type": "token_type_embeddings",
    "embedding.project": "project_in",
    "vision.embedding.patch": "patch_embeddings.projection patch_embedding",
    "embedding.conv1": "conv1",
    "embedding.conv2": "conv2",
    "head": "lm_head embed_out proj_out lm_head.decoder predictions.decoder vocab_projector",
    "head.dense": "lm_head.dense transform.dense vocab_transform",
    "head.project": "project_out",
    "head.next": "seq_relationship",
    "classifier": "classifier score qa_outputs classifier.out_proj",
    "classifier.dense": "pre_classifier classifier.dense",
    "pooler": "pooler.dense",
    "vision.projection": "visual_projection",
    "text.projection": "text_projection",
}

# How a type of model (a configuration's model_type) orders the rows of a fused weight, which no
# path tells: "stacked", part after part; "grouped", a key-value head after another, each as its
# query heads, its key and its value.
ORDERS = {
    "gpt2": "stacked",
    "phi3": "stacked",
    "mixtral": "stacked",
    "qwen2_moe": "stacked",
    "qwen3_moe": "stacked",
    "gpt_neox": "grouped",
    "bloom": "grouped",
    "falcon": "grouped",
    "RefinedWeb": "grouped",  # Falcon's first names
    "RefinedWebModel": "grouped",
}

# Words of a path that say which stack it is in; the first that is there counts.
SIDE_WORDS = {
    "vision": ("vision_model", "vision_tower", "visual", "vit"),
    "text": ("text_model",),
    "audio": ("audio_tower", "audio_model"),
    "encoder": ("encoder", "bert", "roberta", "distilbert", "mpnet"),
    "decoder": ("decoder", "language_model"),
}
# Kinds that belong to no stack, by their first word or the whole of their path.
_OF_NO_SIDE = {"head", "classifier", "pooler"}
_BOTH = "shared"  # one embedding for an encoder and a decoder

# Words before the number of a layer.
_STACKS = {"layers", "layer", "h", "block", "blocks"}

_Meaning = tuple[str, str]  # side, "" where the row says none; kind


def _meaning(text: object, where: str) -> _Meaning:
    """A row's text as side and kind, checked.

    Raises:
        MismatchError: no text, or not of the form of a kind.
    """
    if not isinstance(text, str):
        raise MismatchError(f"{where} must be a kind such as 'mlp.up', found {one_line(text)}")
    side, _, kind = text.partition(".")
    meant = (side, kind) if side in SIDES else ("", text)
    try:
        Role(meant[1], None, meant[0])
    except MismatchError as e:
        raise MismatchError(f"{where}: {e}") from e
    return meant


TABLE = {end: _meaning(text, end) for text, ends in _ROWS.items() for end in ends.split()}


def combined(tables: Mapping[str, str] | Iterable[Mapping[str, str]]) -> list[dict[str, _Meaning]]:
    """The user's tables, checked, and then lorafold's own.

    Raises:
        MismatchError: something that is no table, or a row that says no kind.
    """
    is_one = isinstance(tables, Mapping) or not isinstance(tables, Iterable)
    given = [tables] if is_one else list(tables)
    checked = []
    for table in given:
        if not isinstance(table, Mapping):
            raise MismatchError(
                "a table is a mapping {end of a path: kind}, as {'mixer.wq': 'attention.query'}; "
                f"found {one_line(table)}"
            )
        checked.append({str(end): _meaning(kind, f"table[{end!r}]") for end, kind in table.items()})
    return [*checked, TABLE]


def ends(path: str) -> Iterator[str]:
    """The path, and what is left of it after each dot: the longest first."""
    yield path
    while path:
        path = path.partition(".")[2]
        if path:
            yield path


def side_of(words: Iterable[str], kind: str, said: str, otherwise: str) -> str:
    """The stack of a module.

    Args:
        words: of its path. kind: of its role. said: the row's own. otherwise: where nothing tells.
    """
    there = list(words)
    if kind.partition(".")[0] in _OF_NO_SIDE or there[-1:] == [_BOTH]:
        return ""
    for side, marks in SIDE_WORDS.items():
        if not set(there).isdisjoint(marks):
            return side
    return said or otherwise


def numbers_in(words: Sequence[str]) -> tuple[int | None, int | None]:
    """The number of the layer, and that of the expert, in the words of a path."""
    numbers = [(b, int(w)) for b, w in zip(["", *words], words, strict=False) if w.isdecimal()]
    experts = [n for before, n in numbers if before == "experts"]
    layers = [n for before, n in numbers if before in _STACKS]
    others = [n for before, n in numbers if before != "experts"]
    return next(iter([*layers, *others]), None), next(iter(experts), None)
