//! A server of language models that share a GPU's memory. It is there to prove the library under
//! real work; it is no product.

pub mod scheduler;
