//! The API over real sockets, in front of an engine that does as each test says.

mod client;
mod connections;
mod errors;
mod fake;
mod streams;
mod whole;
