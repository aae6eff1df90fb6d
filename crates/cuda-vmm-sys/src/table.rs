//! The table of entry points, and a name for each of them.

use crate::*;
use core::ffi::{CStr, c_int};

/// Names the function inside a header's nullable function-pointer type.
pub trait FunctionPointer {
    /// The same type without the null.
    type Function;
}

impl<F> FunctionPointer for Option<F> {
    type Function = F;
}

macro_rules! define_table {
    (
        required { $(fn $name:ident($($argument:ident: $type:ty),*) = $pfn:ident, $version:literal;)* }
        optional { $(fn $optional:ident($($optional_argument:ident: $optional_type:ty),*) = $optional_pfn:ident, $optional_version:literal;)* }
    ) => {
        /// Every driver entry point that this project calls, as plain function pointers.
        ///
        /// [`load`](crate::load) fills it from the driver; a simulated driver fills it with its own
        /// functions. Calling through it is as unsafe as calling the C function of that name.
        #[allow(non_snake_case)]
        #[derive(Clone, Copy, Debug)]
        pub struct DriverTable {
            $(
                #[doc = concat!("`", stringify!($name), "`, as CUDA ", stringify!($version), " has it.")]
                pub $name: <$pfn as FunctionPointer>::Function,
            )*
            $(
                #[doc = concat!("`", stringify!($optional), "`, since CUDA ", stringify!($optional_version), "; absent from older drivers.")]
                pub $optional: $optional_pfn,
            )*
        }

        /// The name of a driver entry point.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DriverFunction {
            $(#[doc = concat!("`", stringify!($name), "`")] $name,)*
            $(#[doc = concat!("`", stringify!($optional), "`")] $optional,)*
        }

        impl DriverFunction {
            /// Every entry point, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)* $(Self::$optional,)*];

            /// The C name, as `cuGetProcAddress` expects it.
            pub const fn c_name(self) -> &'static CStr {
                let name = match self {
                    $(Self::$name => concat!(stringify!($name), "\0"),)*
                    $(Self::$optional => concat!(stringify!($optional), "\0"),)*
                };
                match CStr::from_bytes_with_nul(name.as_bytes()) {
                    Ok(name) => name,
                    Err(_) => unreachable!(),
                }
            }

            /// The CUDA version whose form of the call the table holds, as `major * 1000 + minor * 10`.
            pub const fn version(self) -> c_int {
                match self {
                    $(Self::$name => $version,)*
                    $(Self::$optional => $optional_version,)*
                }
            }

            /// Whether a driver may lack this entry point.
            pub const fn is_optional(self) -> bool {
                matches!(self, $(Self::$optional)|*)
            }
        }

        impl DriverTable {
            /// Fills a table from `resolve`, which answers a non-null address or an error.
            ///
            /// # Safety
            /// An address returned for a function must be that function, with the signature that
            /// the header gives it, valid for as long as the table or a copy of it is used.
            #[cfg(target_os = "linux")]
            pub(crate) unsafe fn resolve_with<E>(
                mut resolve: impl FnMut(DriverFunction) -> Result<core::ptr::NonNull<core::ffi::c_void>, E>,
            ) -> Result<Self, E> {
                Ok(Self {
                    // SAFETY: the caller promises that the address is this very function; a
                    // non-null data pointer and a function pointer have the same representation
                    // on every target that has a CUDA driver.
                    $($name: unsafe { core::mem::transmute::<core::ptr::NonNull<core::ffi::c_void>, <$pfn as FunctionPointer>::Function>(resolve(DriverFunction::$name)?) },)*
                    // SAFETY: as above.
                    $($optional: resolve(DriverFunction::$optional).ok().map(|address| unsafe { core::mem::transmute(address) }),)*
                })
            }
        }
    };
}

crate::driver_functions!(define_table);

impl DriverFunction {
    /// The C name.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }
}

impl core::fmt::Display for DriverFunction {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        formatter.write_str(self.name())
    }
}
