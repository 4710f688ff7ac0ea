"""A zoo of tiny models of many families, for the tests and the table of docs/models.md.

A model has some ten thousand random weights; nothing is downloaded. `ZOO` holds the families by name,
`SECTIONS` their names by kind.
"""

from tests.zoo import (
    audio,
    decoders,
    encoders,
    experts,
    multimodal,
    plain,
    seq2seq,
    statespace,
    vision,
)
from tests.zoo.family import Family

SECTIONS: dict[str, list[Family]] = {
    "Text encoders": encoders.FAMILIES,
    "Decoders": decoders.FAMILIES,
    "Encoder-decoders": seq2seq.FAMILIES,
    "Vision": vision.FAMILIES,
    "Audio": audio.FAMILIES,
    "Images and text": multimodal.FAMILIES,
    "Mixtures of experts": experts.FAMILIES,
    "State space": statespace.FAMILIES,
    "Not from transformers": plain.FAMILIES,
}
ZOO: dict[str, Family] = {f.name: f for families in SECTIONS.values() for f in families}
