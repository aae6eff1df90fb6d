//! Fails each driver call in turn, and checks that nothing is left behind. Runs on the simulated
//! driver: its fault plan makes calls fail, and its books show what is held.
#![cfg(all(feature = "simulator", not(feature = "cuda")))]

#[path = "../common/mod.rs"]
mod common;

mod addresses;
mod bench;
mod blocks;
mod fork;
mod pools;
mod rows;
mod sequence;
