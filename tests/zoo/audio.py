"""Speech and sound."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ctc_loss

from tests.zoo.family import TEXT, Batch, Family, from_config, generator, tokens

WAVE = {
    **TEXT,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 4],
    "conv_stride": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "ctc_zero_infinity": True,
}
WHISPER = {
    "vocab_size": 128,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _speech(seed: int) -> Batch:
    """Mel features (2, 8, 32) and token labels."""
    features = torch.randn(2, 8, 32, generator=generator(seed))
    return {"input_features": features, "labels": tokens(seed, length=8)}


def _waves(seed: int) -> Batch:
    """Waveforms (2, 1600)."""
    return {"input_values": torch.randn(2, 1600, generator=generator(seed))}


def _ctc(output: Any) -> Tensor:
    """The CTC loss, outside the forward: with `labels` the forward selects by their values."""
    scores = output.logits.log_softmax(-1).transpose(0, 1)
    times, rows = scores.shape[:2]
    targets = torch.arange(3, 9).repeat(rows, 1)
    return ctc_loss(scores, targets, torch.full((rows,), times), torch.full((rows,), 6))


def _spectrograms(seed: int) -> Batch:
    """Spectrograms (2, 32, 16) and classes."""
    values = torch.randn(2, 32, 16, generator=generator(seed))
    return {"input_values": values, "labels": tokens(seed, 2, 1, 0, 5).flatten()}


def _wave(name: str, note: str = "", **changes: Any) -> Family:
    return Family(name, partial(from_config, "CTC", name, WAVE, **changes), _waves, note, _ctc)


def _classifier() -> Any:
    return from_config("AudioClassification", "wav2vec2", WAVE, num_labels=5)


def _labelled_waves(seed: int) -> Batch:
    return {**_waves(seed), "labels": tokens(seed, 2, 1, 0, 5).flatten()}


def _sound() -> Any:
    shape = {**TEXT, "max_length": 32, "num_mel_bins": 16, "patch_size": 4, "num_labels": 5}
    return from_config(
        "AudioClassification",
        "audio-spectrogram-transformer",
        shape,
        frequency_stride=4,
        time_stride=4,
    )


FAMILIES = [
    Family("whisper", partial(from_config, "SpeechSeq2Seq", "whisper", WHISPER), _speech),
    _wave("wav2vec2", "CTC loss outside the forward"),
    Family("wav2vec2 classifier", _classifier, _labelled_waves),
    _wave("hubert", "CTC loss outside the forward"),
    _wave("wavlm", "CTC loss outside the forward"),
    Family("audio_spectrogram_transformer", _sound, _spectrograms),
]
