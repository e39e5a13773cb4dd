"""The errors of this package, as a tree.

    GrpoToolkitError
    ├── GateError                   a measured model is slower than its gate allows
    ├── InputError                  wrong use or unreadable input: one line, exit code 2
    │   ├── CheckpointError         a folder that is not the checkpoint it should be
    │   └── OutputExistsError       an output folder that is there already and is not ours to replace
    ├── OutOfMemoryError            a measured batch did not fit; the model can be asked again, or has ended
    ├── PeerError                   another rank failed; carries what it said
    ├── ResumeError                 a resume that would train from other weights than the checkpoint's
    ├── TrackerError                W&B or Trackio did not take what was replayed into it
    ├── UnsupportedError            right use, but not something this version can do; says what to do instead
    ├── VerificationError           an export that does not say the same as the policy it came from
    └── WorkerError                 a process that we started to load a model failed or went silent

Every message names the path (and the key, where there is one), what was found, what was expected and what to do.
"""

from __future__ import annotations


class GrpoToolkitError(Exception):
    """The base class of every error that this package raises on purpose."""


class GateError(GrpoToolkitError):
    """A measured model is slower than its gate allows; the explanation was printed and is in `latency.jsonl`."""


class InputError(GrpoToolkitError):
    """The caller's arguments or files are wrong; nothing was changed."""


class CheckpointError(InputError):
    """A folder or file is not a readable checkpoint."""


class OutputExistsError(InputError):
    """The output folder exists and replacing it was not asked for, or it is not an export of ours."""


class OutOfMemoryError(GrpoToolkitError):
    """A batch did not fit into the memory of its device; a sweep ends there, and says so."""


class PeerError(GrpoToolkitError):
    """Another rank of the same training failed; its message says where and why."""


class ResumeError(GrpoToolkitError):
    """A resumed training would not continue from its checkpoint."""


class TrackerError(GrpoToolkitError):
    """A tracker that was asked for by name does not work; during training this is a warning instead."""


class UnsupportedError(GrpoToolkitError):
    """The request is sound but not supported here."""


class VerificationError(GrpoToolkitError):
    """An export failed a check; it was not published."""


class WorkerError(GrpoToolkitError):
    """A worker process failed; the message ends with the end of its log."""


def first_words(error: BaseException) -> str:
    """Return the first lines of an exception that say something: a line that ends in a colon, and those under it.

    "RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:" alone tells nobody that the sizes differ.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said: list[str] = []
    for line in lines:
        said.append(line)
        if not line.endswith(":") or len(said) == 3:
            break
    return " ".join(said) or type(error).__name__


def named(error: BaseException) -> str:
    """Return an exception's type with its first words: "KeyError: 'tokenizer'"."""
    return f"{type(error).__name__}: {first_words(error)}"
