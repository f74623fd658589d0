"""Which tags a checkpoint can have: a tag is the path of the checkpoint's folder below the save_dir."""

from __future__ import annotations

from collections.abc import Collection

from ds_vshape.checkpoint.errors import CheckpointError

# What the names of a checkpoint's drafts and of one that is being replaced end with (commit.py).
DRAFT, REPLACED = ".draft", ".replaced"
# Most file systems take names of 255 bytes; a draft's has a dot and 16 digits more than the tag, and DRAFT.
_LONGEST = 255 - 1 - 16 - len(DRAFT)


def check_tag(tag: str, reserved: Collection[str] = ()) -> None:
    """Raise CheckpointError unless `tag` can name a checkpoint.

    Args:
        reserved: names of files in the save_dir.
    """
    wrong = next((wrong for name in tag.split("/") if (wrong := _wrong_with(name)) is not None), None)
    if wrong is None and tag.split("/")[0] in reserved:
        wrong = f"{tag.split('/')[0]!r} is the name of a file in the save_dir"
    if wrong is not None:
        raise CheckpointError(
            f"tag = {tag!r}: {wrong}. A tag must be the name of a folder below the save_dir (or several, joined by "
            f"'/'): not empty, not '.' or '..', at most {_LONGEST} bytes in UTF-8, without control characters, without "
            f"spaces at its ends, and not ending with {DRAFT!r} or {REPLACED!r}; for example 'global_step100'")


def _wrong_with(name: str) -> str | None:
    """Why a folder can't have the name `name`."""
    if name in ("", ".", ".."):
        return f"{name!r} isn't the name of a folder"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "it has control characters"
    if name != name.strip():
        return "it has spaces at its ends"
    if name.endswith((DRAFT, REPLACED)):
        return f"{name!r} would be taken for a checkpoint that is being saved"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it has characters that UTF-8 can't encode"
    return f"it has {size} bytes" if size > _LONGEST else None
