"""What happens to codebooks between steps: synchronisation, initialisation, health."""

from pipeline.codebooks.alarm import Alarm
from pipeline.codebooks.health import CodebookHealth, QuantizerHealth
from pipeline.codebooks.initialise import initialise_codebooks
from pipeline.codebooks.sync import CodebookSync

__all__ = ["Alarm", "CodebookHealth", "CodebookSync", "QuantizerHealth", "initialise_codebooks"]
