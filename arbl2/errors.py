"""The one error family.

Every error is a sentence that says what is wrong and what can be done next; the command line prints it without a traceback
and ends with the exit code of its class.

    Arbl2Error                exit 1   never raised itself
     +-- ConfigError          exit 2   ours to mend: an option, a config file, a rule that is missing
     +-- TapeError            exit 3   the data: a damaged, foreign, incomplete or mismatching file
     +-- VenueError           exit 4   theirs: an endpoint that cannot be reached or refuses us
     +-- StorageError         exit 5   the machine: a folder that cannot be written, a full disk, a lock that is held
     +-- EvidenceError        exit 6   a calibration or comparison that the data does not support
     +-- EngineError          exit 70  a defect of arbl2 (or an overflow) that stopped the run before it could lie
"""

from __future__ import annotations


class Arbl2Error(Exception):
    """Root of the family. ``exit_code`` is what a command ends with."""

    exit_code = 1


class ConfigError(Arbl2Error):
    """An option or a config value cannot be used."""

    exit_code = 2


class TapeError(Arbl2Error):
    """A tape or run on disk is damaged, foreign, or does not match its manifest."""

    exit_code = 3


class VenueError(Arbl2Error):
    """A venue cannot be reached or refuses the request."""

    exit_code = 4


class StorageError(Arbl2Error):
    """The machine cannot store or lock what it was asked to."""

    exit_code = 5


class EvidenceError(Arbl2Error):
    """The data does not support the conclusion asked for."""

    exit_code = 6


class EngineError(Arbl2Error):
    """An invariant of the engine broke: stop rather than report a wrong number."""

    exit_code = 70
