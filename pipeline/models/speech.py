"""wav2vec 2.0 pretraining: fairseq2's encoder, our masking, quantizer and objective.

fairseq2 builds the feature extractor, the frontend and the transformer; its own model would unmask frames until all
rows of a batch have the same count, and quantize through a compiled closure. In: a SpeechBatch. Out: summed losses and
metrics.
"""

from __future__ import annotations

from typing import Any

import soundfile  # noqa: F401 - before fairseq2: it brings the libsndfile that fairseq2 looks for
import torch
from fairseq2.models.transformer import TransformerNormOrder
from fairseq2.models.wav2vec2 import Wav2Vec2Config as Fairseq2Config
from fairseq2.models.wav2vec2 import Wav2Vec2EncoderConfig, Wav2Vec2Factory
from fairseq2.nn import BatchLayout
from torch import Tensor, nn

from pipeline.data.collation import SpeechBatch
from pipeline.data.masking import samples_for
from pipeline.models.base import StepOutput, quantizer_losses, quantizer_metrics
from pipeline.models.config import Wav2Vec2Config
from pipeline.models.contrastive import contrast
from pipeline.models.convolutions import compute_by_frames
from pipeline.quantizers import Quantizer


class Wav2Vec2Pretraining(nn.Module):
    """Speech encoder with a quantizer for its targets (Baevski et al., arXiv 2006.11477).

    ``quantizer`` sees the layer-normed features of the masked frames only: neither padding nor visible frames count in
    a codebook.
    """

    def __init__(self, config: Wav2Vec2Config, quantizer: Quantizer) -> None:
        super().__init__()
        self.config = config
        factory = Wav2Vec2Factory(fairseq2_config(config))
        self.frontend = factory.create_encoder_frontend()
        compute_by_frames(self.frontend.feature_extractor)
        self.encoder = factory.create_encoder()
        self.mask_embedding = nn.Parameter(torch.rand(config.model_dim))
        self.target_dropout = nn.Dropout(config.feature_dropout)
        self.quantizer = quantizer
        self.context_projection = nn.Linear(config.model_dim, config.final_dim)
        self.target_projection = nn.Linear(quantizer.dim, config.final_dim)

    @property
    def frame_layers(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, kernel, stride) of each convolution: they decide how many frames a clip has."""
        return self.config.conv_layers

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that may be computed twice, and compiled."""
        return list(self.encoder.layers)

    def forward(self, batch: SpeechBatch) -> StepOutput:
        """Losses and metrics of one micro-batch."""
        features, layout, raw = self._features(batch.waveforms, batch.lengths)
        if features.shape[:2] != batch.mask.shape:
            raise ValueError(
                f"the batch's mask has shape {tuple(batch.mask.shape)}, the features {tuple(features.shape[:2])}: "
                "collate with this model's conv_layers (build_collation)"
            )
        output = self.quantizer(self.target_dropout(features[batch.mask]))
        encoded = self._encode(features, layout, batch.mask)
        found = contrast(
            self.context_projection(encoded[batch.mask]),
            self.target_projection(output.vectors),
            output.vectors,
            batch.mask.sum(dim=1).tolist(),
            batch.negatives,
            self.config.logit_temperature,
        )
        losses = {"contrastive": found.loss} | quantizer_losses(output, batch.targets)
        if self.config.feature_penalty:
            # A sum over targets of their clip's mean, so that it does not depend on which clips share a micro-batch;
            # of clips of one length with equally many targets it is the mean over all that fairseq takes.
            squares = mean_squares_of_clips(raw, batch.frame_lengths)
            losses["feature_penalty"] = self.config.feature_penalty * (squares * batch.mask.sum(dim=1)).sum()
        masked = torch.tensor(batch.targets, device=found.loss.device)
        metrics = {
            "accuracy": (found.correct, found.valid_targets),
            "contrastive": (found.loss.detach(), found.valid_targets),
            "valid_targets": (found.valid_targets, masked),
            "valid_negatives": (found.valid_negatives, found.negatives),
        }
        return StepOutput(losses=losses, metrics=metrics | quantizer_metrics(output), quantizer=output)

    @torch.no_grad()
    def extract(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """The transformer's output ``(batch, frames, model_dim)`` for unmasked clips, as published models give it.

        waveforms ``(batch, time)``, zeros behind each clip's end; lengths ``(batch,)`` in samples.
        """
        features, layout, _ = self._features(waveforms, lengths)
        return self._encode(features, layout, None)

    @torch.no_grad()
    def encode_codes(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Codes of every frame, ``(batch, frames, groups)`` int64, and how many frames each clip has, ``(batch,)``."""
        features, _, _ = self._features(batch.waveforms, batch.lengths)
        return self.quantizer.encode(features), batch.frame_lengths

    def _features(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, BatchLayout, Tensor]:
        """Layer-normed features ``(batch, frames, feature_dim)``, their layout, and the features as they left the
        convolutions. Raises ValueError for a clip of which they can't make one.
        """
        samples = lengths.tolist()
        field = samples_for(1, self.config.conv_layers)
        short = [count for count in samples if count < field]
        if short:
            raise ValueError(
                f"{len(short)} of {len(samples)} clips have fewer audio samples, {min(short)} for one, than the "
                f"{field} of a frame of model.conv_layers: leave them out, as data.min_seconds does"
            )
        waveforms = waveforms.to(self.mask_embedding.dtype)
        layout = BatchLayout.of(waveforms, seq_lens=samples)
        return self.frontend.extract_features(waveforms, layout)

    def _encode(self, features: Tensor, layout: BatchLayout, mask: Tensor | None) -> Tensor:
        """→ ``(batch, frames, model_dim)``; masked frames are replaced by the mask embedding."""

        def masker(frames: Tensor, _: BatchLayout) -> tuple[Tensor, Tensor]:
            assert mask is not None
            return torch.where(mask.unsqueeze(-1), self.mask_embedding.to(frames.dtype), frames), mask

        # fairseq2 types its masker as a module; it calls it as the function that it is here.
        chosen: Any = None if mask is None else masker
        frames, _ = self.frontend.process_features(features, layout, chosen)
        return self.encoder(frames, layout)


def mean_squares_of_clips(features: Tensor, frame_lengths: Tensor) -> Tensor:
    """Mean of the squared features of each clip's real frames: features ``(batch, frames, dim)``, lengths ``(batch,)``
    → fp32 ``(batch,)``."""
    real = torch.arange(features.shape[1], device=features.device) < frame_lengths.unsqueeze(1)
    of_frames = features.float().square().mean(dim=2).masked_fill(~real, 0.0)
    return of_frames.sum(dim=1) / frame_lengths


def fairseq2_config(config: Wav2Vec2Config) -> Fairseq2Config:
    """fairseq2's configuration of the same encoder."""
    pre_norm = config.norm_order == "pre"
    encoder: dict[str, Any] = {
        "model_dim": config.model_dim,
        "feature_dim": config.feature_dim,
        "first_pass_dropout_p": config.feature_dropout,
        "layer_norm_features": not pre_norm,
        "feature_extractor_layer_descs": list(config.conv_layers),
        "feature_extractor_bias": config.conv_norm == "layer",
        "feature_extractor_layer_norm_convs": config.conv_norm == "layer",
        "feature_grad_scale": config.feature_gradient_scale,
        "pos_conv_kernel_size": config.position_kernel,
        "num_pos_conv_groups": config.position_groups,
        "num_encoder_layers": config.layers,
        "num_encoder_attn_heads": config.heads,
        "ffn_inner_dim": config.ffn_dim,
        "dropout_p": config.dropout,
        "attn_dropout_p": config.attention_dropout,
        "ffn_inner_dropout_p": config.ffn_dropout,
        "layer_drop_p": config.layer_drop,
        "norm_order": TransformerNormOrder.PRE if pre_norm else TransformerNormOrder.POST,
    }
    return Fairseq2Config(encoder_config=Wav2Vec2EncoderConfig(**encoder), final_dim=config.final_dim)
