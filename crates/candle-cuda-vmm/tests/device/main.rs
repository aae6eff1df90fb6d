//! The facade on one device: a GPU, or the CPU device with the simulated driver. The variables of
//! `common::settings` select the device; the cases are the same.
#![cfg(feature = "simulator")]

#[path = "../common/mod.rs"]
mod common;

mod blocks;
mod budget;
mod bytes;
mod elastic;
mod fork;
mod growth;
mod guarantees;
mod joined;
mod kernels;
mod kv_cache;
mod kv_errors;
mod leak;
mod mapping;
mod memory;
mod one_range;
mod page_size;
mod physical_memory;
mod raw;
mod refusal;
mod seed;
mod settings;
mod shared;
