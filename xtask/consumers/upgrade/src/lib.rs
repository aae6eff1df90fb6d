//! Nothing: the programs are the examples of candle-cuda-vmm 0.1.1.
