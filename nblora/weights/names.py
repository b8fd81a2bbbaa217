"""Which tensor of a checkpoint an adapter's tensor means: maps, ties, and the nearest names when none fits."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles
from nblora.formats.peft_tensors import PREFIX
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo, iterate_chunks

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "embeddings")
HEADS = ("lm_head", "embed_out", "output")
DECODERS = ("lm_head", "predictions")  # whose `decoder` is the head
_PROBED, _COMPARED = 4096, 2**20  # bytes compared first, and at a time


def parse_maps(maps: Iterable[str]) -> list[tuple[list[str], list[str]]]:
    """Read `OLD=NEW` rules: a run of dotted parts of an adapter's name, and what stands for it in the checkpoint.

    Raises
    ------
    ValueError
        If a rule has no `=` or an empty OLD.
    """
    rules = []
    for text in maps:
        old, equals, new = text.partition("=")
        parts = _parts(old.removeprefix(PREFIX) or old)
        if not equals or not parts:
            raise ValueError(f"--map {text!r}: expected OLD=NEW, such as transformer.=  or  fc1=dense1")
        rules.append((parts, _parts(new)))
    return rules


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part]


def apply_maps(name: str, rules: Sequence[tuple[list[str], list[str]]]) -> str:
    """Replace the first run of parts that a rule names; the first rule that fits is the only one applied."""
    parts = name.split(".")
    for old, new in rules:
        for at in range(len(parts) - len(old) + 1):
            if parts[at : at + len(old)] == old:
                return ".".join(parts[:at] + new + parts[at + len(old) :])
    return name


@dataclass
class Ties:
    """Names that share one weight.

    Attributes
    ----------
    absent : dict of str to str
        A name that the checkpoint does not store, and the stored one that it shares.
    stored : dict of str to list of str
        A stored name, and the other stored names that it shares its weight with.
    """

    absent: dict[str, str] = field(default_factory=dict)
    stored: dict[str, list[str]] = field(default_factory=dict)


def find_ties(model: ModelFiles, targets: Iterable[str]) -> Ties:
    """Find which of the `targets` share their weight with another tensor of the checkpoint.

    Three signs count: an alias in a file's metadata (as safetensors' `save_model` leaves it), a missing output head of
    a model whose `config.json` does not untie it, and a second tensor of the same bytes under a name that differs in
    more than its numbers, unless `config.json` says that nothing is tied.

    Parameters
    ----------
    model : ModelFiles
    targets : iterable of str
        Names of parameters that adapters change.

    Returns
    -------
    Ties
    """
    ties = Ties()
    tensors = model.tensors
    for shard in model.shards:
        for alias, name in shard.metadata.items():
            if alias not in tensors and name in tensors:
                ties.absent[alias] = name
    tied = model.config.get("tie_word_embeddings")
    for target in targets:
        if target not in tensors and target not in ties.absent:
            shared = _bias_of(target, tensors)
            if shared is None and model.config and tied is not False:
                shared = _embedding_of(target, tensors)
            if shared:
                ties.absent[target] = shared
    if tied is not False:
        ties.stored = _twins(tensors, {ties.absent.get(target, target) for target in targets} & tensors.keys())
    return ties


def _bias_of(target: str, tensors: Mapping[str, object]) -> str | None:
    """The stored bias that a masked language model's decoder shares: that of the head around it."""
    head, decoder, _ = target.rpartition(".decoder.bias")
    return f"{head}.bias" if decoder and f"{head}.bias" in tensors else None


def _embedding_of(head: str, tensors: Mapping[str, object]) -> str | None:
    """The input embedding that a head of this name is tied to, if there is exactly one candidate."""
    parts = head.split(".")
    if len(parts) > 2 and parts[-2] == "decoder" and parts[-3] in DECODERS:
        parts[-2] = HEADS[0]
    if len(parts) < 2 or parts[-2] not in HEADS or parts[-1] != "weight":
        return None
    found = [name for name in tensors if name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS]
    found = [name for name in found if name.endswith(".weight")]
    return found[0] if len(found) == 1 else None


def _twins(tensors: Mapping[str, tuple[SafetensorsFile, TensorInfo]], targets: set[str]) -> dict[str, list[str]]:
    """Groups of matrices with the same bytes, told apart by their first few before any is read whole."""
    shapes = {(tensors[name][1].dtype, tensors[name][1].shape) for name in targets}
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, (file, info) in tensors.items():
        if len(info.shape) > 1 and info.size and (info.dtype, info.shape) in shapes:
            probe = np.empty(min(_PROBED, info.nbytes), np.uint8)
            file.pread(probe.data, info.start)
            alike.setdefault((info.dtype, info.shape, probe.tobytes()), []).append(name)
    result = {}
    for group in alike.values():
        for target in targets.intersection(group) if len(group) > 1 else ():
            others = [name for name in group if _without_numbers(name) != _without_numbers(target)]
            twins = [name for name in others if same_bytes(*tensors[target], *tensors[name])]
            if twins and not _is_constant(*tensors[target]):
                result[target] = twins
    return result


def _is_constant(file: SafetensorsFile, info: TensorInfo) -> bool:
    """Whether a tensor is one value throughout, as freshly initialised ones are: such twins are no tie."""
    width = info.nbytes // info.size
    buffer = np.empty(_COMPARED, np.uint8)
    first = np.empty(width, np.uint8)
    file.pread(first.data, info.start)
    for start, stop in iterate_chunks(info.nbytes, _COMPARED):
        part = buffer[: stop - start]
        file.pread(part.data, info.start + start)
        if not (part.reshape(-1, width) == first).all():
            return False
    return True


def _without_numbers(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def same_bytes(a_file: SafetensorsFile, a: TensorInfo, b_file: SafetensorsFile, b: TensorInfo) -> bool:
    """Whether two tensors are of one dtype and shape and hold the same bytes."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size = min(_COMPARED, max(a.nbytes, 1))
    first, second = np.empty(size, np.uint8), np.empty(size, np.uint8)
    for start, stop in iterate_chunks(a.nbytes, size):
        x, y = first[: stop - start], second[: stop - start]
        a_file.pread(x.data, a.start + start)
        b_file.pread(y.data, b.start + start)
        if not np.array_equal(x, y):
            return False
    return True


def unmatched(owner: str, missing: Sequence[tuple[str, str]], candidates: Iterable[str]) -> FormatError:
    """Return the error for tensors that match nothing in the checkpoint, with the nearest names there are.

    Parameters
    ----------
    owner : str
        The adapter.
    missing : sequence of (str, str)
        The parameter that was looked for, and the adapter's tensor that asked for it.
    candidates : iterable of str
        The names in the checkpoint.
    """
    known = sorted(candidates)
    lines = []
    for name, origin in missing[:5]:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        lines.append(f"  {name} (for {origin}): nearest " + (", ".join(near) if near else "none"))
    if len(missing) > 5:
        lines.append(f"  and {len(missing) - 5} more")
    hint = _map_hint(missing[0][0], known)
    remedy = f"try --map {hint}" if hint else "is the adapter made for this base? --map OLD=NEW renames"
    count = f"{len(missing)} tensors match" if len(missing) > 1 else "1 tensor matches"
    return FormatError(f"{owner}: {count} nothing in the checkpoint; {remedy}\n" + "\n".join(lines))


def _map_hint(name: str, known: Sequence[str]) -> str | None:
    """A rule that would make `name` match, where the two differ by leading parts only."""
    parts = name.split(".")
    tails = {".".join(parts[cut:]): ".".join(parts[:cut]) for cut in range(1, len(parts) - 1)}
    for candidate in known:
        if candidate in tails:
            return f"{tails[candidate]}="
        if candidate.endswith("." + name):
            return f"{parts[0]}={candidate.removesuffix(name)}{parts[0]}"
    return None
