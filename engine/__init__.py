"""What runs a bundle: the manifest and the sessions. Knows neither torch nor where frames come from."""

from engine.errors import BundleError, ConfigError, DataError, EngineError, OnsetError, WireError
from engine.manifest import Decoding, Frame, Manifest, Tensor, Training, read_bundle, write_bundle
from engine.recording import read_recording
from engine.session import OnnxSession, Session, Slot

__all__ = [
    "BundleError",
    "ConfigError",
    "DataError",
    "Decoding",
    "EngineError",
    "Frame",
    "Manifest",
    "OnnxSession",
    "OnsetError",
    "Session",
    "Slot",
    "Tensor",
    "Training",
    "WireError",
    "read_bundle",
    "read_recording",
    "write_bundle",
]
