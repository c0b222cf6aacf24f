"""Activation recomputation: blocks forget what they computed in forward, and compute it again in backward (Chen et al. 2016)."""
