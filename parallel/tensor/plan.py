"""Plan: which parameters tensor parallelism divides, and along which dimension. What follows is left to the rules (parallel/split).

    column      the features that a module gives: heads, or the inside of an MLP; "column:3" where it is three of them in one, as fused q, k and v
                are, "column:512+128+128" where they are of different lengths
    row         the features that it takes
    vocab       the rows of an embedding
    experts     the inside of every expert, of modules that keep theirs in two parameters, gate_up_proj and down_proj
    whole       nothing: every rank has it

A user's plan maps patterns of module names to these words. Without one, a model that says its own (Hugging Face's `_tp_plan`) is asked, and of all
others modules are known by the names that such modules have: a wrong guess costs speed, and no number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from ringfold.collectives.errors import ConfigError, nearest
from ringfold.parallel.layout import model_size
from ringfold.parallel.placement import Shard
from torch import nn

__all__ = ["WORDS", "Plan", "choose_plan", "find_plan", "shards_of"]

Plan = Mapping[str, str]
WORDS = ("column", "row", "vocab", "experts", "whole")

COLUMN = """
    q k v q_proj k_proj v_proj query key value wq wk wv to_q to_k to_v q_lin k_lin v_lin
    qkv c_attn Wqkv qkv_proj query_key_value in_proj
    up gate up_proj gate_proj gate_up_proj fc1 c_fc w1 w3 lin1 linear1 wi wi_0 wi_1 fc_in dense_h_to_4h intermediate.dense mlp.0
"""
ROW = """
    o o_proj out out_proj wo to_out to_out.0 out_lin c_proj proj attn.proj attention.dense attention.output.dense self_attention.dense
    down down_proj fc2 w2 lin2 linear2 fc_out dense_4h_to_h output.dense mlp.2
"""
VOCAB = "embed embedding embeddings embed_tokens wte tok_embeddings word_embeddings token_embedding tok_emb shared embed_in"
FUSED = ("qkv", "c_attn", "Wqkv", "qkv_proj", "in_proj")  # query_key_value has what belongs to a head together: no pieces
KEYS_AND_VALUES = "k v k_proj v_proj key value wk wv to_k to_v k_lin v_lin"
# Hugging Face's words (transformers/integrations/tensor_parallel.py)
OF_HUGGING_FACE = {"colwise": "column", "colwise_rep": "column", "colwise_gather_output": "column", "rowwise": "row", "rowwise_rep": "row"}
OF_HUGGING_FACE |= {"embedding_rowwise": "vocab", "embedding_colwise": "column", "rowwise_split_input": "row", "packed_colwise": "column:2"}


def choose_plan(module: nn.Module, size: int, plan: Plan | None) -> dict[str, str]:
    """Return a word for each module that is divided among `size` ranks, by name.

    Raises:
        ConfigError: a pattern of `plan` fits no module, or its word is none; all such are named.
    """
    if plan is None:
        return find_plan(module, size)
    modules = {name: part for name, part in module.named_modules() if next(part.parameters(), None) is not None}
    problems = []
    for pattern, word in plan.items():
        if word.partition(":")[0] not in WORDS:
            problems.append(f"{pattern!r}: {word!r} is none of {', '.join(WORDS)}, column:N")
        if not any(fnmatchcase(name, pattern) for name in modules):
            meant = nearest(pattern, list(modules))
            problems.append(f"{pattern!r} fits no module with parameters" + (f"; did you mean {meant!r}?" if meant else ""))
    if problems:
        raise ConfigError("plan: " + "\n  ".join(problems))
    found = {name: next((word for pattern, word in plan.items() if fnmatchcase(name, pattern)), None) for name in modules}
    return {name: word for name, word in found.items() if word not in (None, "whole")}  # type: ignore[misc]


def find_plan(module: nn.Module, size: int) -> dict[str, str]:
    """Return a word for each module that is known: by the model's own plan, by its class, or by its name.

    Keys and values of fewer heads than `size` divides stay whole: each rank then computes all of them, for its own query heads.
    """
    heads, shared_heads = (model_size(module, f"{kind} heads") or 0 for kind in ("attention", "key-value"))
    grouped = bool(shared_heads) and shared_heads != heads
    own = dict(_own_plan(module))
    found = {}
    sizes = {part.num_embeddings for _, part in module.named_modules() if isinstance(part, nn.Embedding)}
    for name, part in module.named_modules():
        word = own.get(name) or _known(name, part, sizes, (heads, shared_heads) if grouped else None)
        is_shared = grouped and (_is_called(name, KEYS_AND_VALUES) or "+" in (word or ""))
        if word is not None and not (is_shared and shared_heads % size):
            found[name] = word
    return found


def shards_of(name: str, part: nn.Module, word: str) -> dict[str, Shard]:
    """Return how each of a module's own parameters is divided; empty for those that are not.

    Raises:
        ConfigError: the word does not go with the module.
    """
    kind, _, detail = word.partition(":")
    transposed = type(part).__name__ == "Conv1D"  # of transformers: a Linear whose weight is [in, out]
    if isinstance(part, nn.MultiheadAttention) and kind == "column":
        fused = (part.embed_dim,) * 3
        weights = {"in_proj_weight": Shard(0, fused), "in_proj_bias": Shard(0, fused)}
        weights |= {f"{which}_proj_weight": Shard(0) for which in "qkv"}
        return {key: shard for key, shard in weights.items() if getattr(part, key, None) is not None}
    if isinstance(part, nn.Embedding) and kind in ("vocab", "column"):
        return {"weight": Shard(0 if kind == "vocab" else 1)}
    if kind == "experts" and _are_experts(part):
        half = part.get_parameter("gate_up_proj").shape[1] // 2
        return {"gate_up_proj": Shard(1, (half, half)), "down_proj": Shard(2)}
    if (isinstance(part, nn.Linear) or transposed) and kind in ("column", "row"):
        weight = part.get_parameter("weight")
        out = 1 if transposed else 0
        if kind == "row":
            return {"weight": Shard(1 - out)}
        pieces = _pieces(name, word, detail, weight.shape[out])
        shards = {"weight": Shard(out, pieces), "bias": Shard(0, pieces)}
        return {key: shard for key, shard in shards.items() if getattr(part, key, None) is not None}
    raise ConfigError(f"plan: {name} is a {type(part).__name__}, which cannot be {word}: that is said of nn.Linear and nn.Embedding")


def _own_plan(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the words of the plan that a Hugging Face model carries, by module name."""
    styles = getattr(module, "_tp_plan", None)
    for pattern, style in styles.items() if isinstance(styles, Mapping) else ():
        word = OF_HUGGING_FACE.get(style)
        for name, part in module.named_modules():
            if word is not None and fnmatchcase(name, pattern) and _can_be(part, word):
                yield name, word


def _can_be(part: nn.Module, word: str) -> bool:
    try:
        return bool(shards_of("", part, word))
    except ConfigError:
        return False


def _are_experts(part: nn.Module) -> bool:
    weights = [part._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(weight is not None and weight.dim() == 3 for weight in weights) and weights[0].shape[1] == 2 * weights[1].shape[2]  # type: ignore[union-attr]


def _known(name: str, part: nn.Module, vocabularies: set[int], grouped: tuple[int, int] | None) -> str | None:
    if isinstance(part, nn.MultiheadAttention):
        return "column"
    if _are_experts(part):
        return "experts"
    if isinstance(part, nn.Embedding):
        return "vocab" if _is_called(name, VOCAB) else None
    if not (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"):
        return None
    taken, given = _features(part)
    if _is_called(name, ROW):  # first: "attn.c_proj" and "c_proj" end alike, and "attention.output.dense" like no column
        return "row"
    if _is_called(name, COLUMN):
        return _column(name.rpartition(".")[2], taken, given, grouped)
    if given in vocabularies and given > taken // 2:
        return "column"  # what gives the logits
    return None


def _column(name: str, taken: int, given: int, grouped: tuple[int, int] | None) -> str:
    """Tell a product that is several in one by its size."""
    if name == "gate_up_proj" and given % 2 == 0:
        return "column:2"
    if name in FUSED and given == 3 * taken:
        return "column:3"
    if name in FUSED and grouped is not None and given % (grouped[0] + 2 * grouped[1]) == 0:
        width = given // (grouped[0] + 2 * grouped[1])
        return f"column:{grouped[0] * width}+{grouped[1] * width}+{grouped[1] * width}"
    return "column"


def _features(part: nn.Module) -> tuple[int, int]:
    weight = part.get_parameter("weight")
    first, second = weight.shape
    return (second, first) if isinstance(part, nn.Linear) else (first, second)


def _is_called(name: str, names: str) -> bool:
    return any(name == known or name.endswith(f".{known}") for known in names.split())


def _pieces(name: str, word: str, detail: str, length: int) -> tuple[int, ...]:
    if not detail:
        return ()
    try:
        numbers = [int(number) for number in detail.split("+")]
    except ValueError:
        raise ConfigError(f"plan: {name}: {word!r} is not column:N or column:N+N+N") from None
    pieces = tuple([length // numbers[0]] * numbers[0]) if len(numbers) == 1 and numbers[0] and length % numbers[0] == 0 else tuple(numbers)
    if sum(pieces) != length:
        raise ConfigError(f"plan: {name}: {word!r} does not make up its {length} features")
    return pieces
