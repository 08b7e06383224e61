"""Operations of a step on a CPU, as MAX's graph calls them."""
from .embedding import Embedding
from .operations import MLP, Attention, AttentionBlock, DecoderLayer, Linear, LinearAdd, NormedLinear
