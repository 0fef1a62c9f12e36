"""The paper's Cyclic(0.2, 1.0) for tiny ViTs, written out by hand."""

BATCH_SIZE = 4
# in epochs of 8, 4 and 3 steps
CYCLE = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4]
CYCLE_OF_4 = [0.2, 0.6, 1.0, 0.6]
CYCLE_OF_3 = [0.2, 0.8, 0.8]
# of 64 patches and a class token: 0.2 * 65 = 13, ...
TOKENS = {0.2: 13, 0.4: 26, 0.5: 32, 0.6: 39, 0.8: 52, 1.0: 65}
