//! The output of bindgen for the machine's headers: the names that this crate has, each checked
//! against this crate's own declaration.

#[allow(
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

macro_rules! take_constants {
    ($($name:ident: $type:ident = $value:literal;)*) => {$(
        pub use bindings::$name;
        const _: () = assert!(
            bindings::$name == $value,
            concat!("cuda.h has another value for ", stringify!($name)),
        );
    )*};
}
constants!(take_constants);

macro_rules! take_types {
    ($($type:ident,)*) => { pub use bindings::{$($type),*}; };
}
types!(take_types);

macro_rules! take_handles {
    ($($pointer:ident = $pointee:ident;)*) => { pub use bindings::{$($pointer, $pointee),*}; };
}
handles!(take_handles);

pub use bindings::{CUhostFn, CUmemAllocationProp_st__bindgen_ty_1};

/// Compiles only if the header declares each required call as the table does.
macro_rules! compare_calls {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $($optional:tt)* }
    ) => {
        $(const _: fn(bindings::$pfn) -> crate::$pfn = |header| header;)*
    };
}
crate::driver_functions!(compare_calls);
const _: fn(bindings::PFN_cuGetProcAddress_v11030) -> crate::PFN_cuGetProcAddress_v11030 =
    |header| header;
