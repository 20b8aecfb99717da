"""Groups of objects that are replaced whole, in a store where nothing can be renamed.

The new objects are put under a name of their own beside the old ones. Once they are whole, an object says so: from then
on the new ones take their places by copying, again from the beginning if the process was killed at it. Before, the old
ones stay; no data leaves the store.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lora_flow.storage.remote import RemotePath, below, copy


@contextlib.contextmanager
def replacing_objects(
    folder: RemotePath, journal: RemotePath, new: RemotePath, gone: Iterable[str], within: Sequence[str]
) -> Iterator[RemotePath]:
    """The folder `new`, whose entries take their places in `folder` at the end, as of `swap.replacing`."""
    try:
        yield new
        made = [below(new, entry) for name in ("", *within) for entry in (new / name).iterdir()]
    except BaseException:
        with contextlib.suppress(OSError):  # or else when the folder is locked next
            new.remove()
        raise
    names = {"old": list(gone), "new": sorted(set(made) - set(within))}
    journal.write_text(json.dumps(names))  # from here on the new entries stay
    finish(folder, journal, new, names)


def finish(folder: RemotePath, journal: RemotePath, new: RemotePath, names: Mapping[str, Sequence[str]]) -> None:
    """Puts the new entries in their places, and removes the old ones. May be cut short and be called again."""
    for name in dict.fromkeys((*names["old"], *names["new"])):
        staged = [(one, folder / below(new, one)) for one in (new / name).objects()]
        (folder / name).remove(keep=[to for _, to in staged])
        copy(staged)
    journal.unlink()
    new.remove()
