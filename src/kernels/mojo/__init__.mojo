"""Operations of a step on a CPU, as MAX's graph calls them."""
from .embedding import Embedding, Pair
from .operations import MLP, Attention, AttentionBlock, DecoderLayer, Linear, LinearAdd, NormedLinear, Store
