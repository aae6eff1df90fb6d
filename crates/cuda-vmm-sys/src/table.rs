//! The table of entry points, and their names.

use crate::*;
use core::ffi::{CStr, c_int};

/// Returns the function type inside a header's nullable function-pointer type.
pub trait FunctionPointer {
    /// The type without null.
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
        /// All driver entry points that this project calls, as function pointers.
        ///
        /// [`load`](crate::load) fills it from the driver. A simulated driver fills it with its own
        /// functions. Calling an entry is as unsafe as calling the C function of that name.
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
            /// All entry points, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)* $(Self::$optional,)*];

            /// Returns the C name, as `cuGetProcAddress` expects it.
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

            /// Returns the CUDA version of the call in the table, as `major * 1000 + minor * 10`.
            pub const fn version(self) -> c_int {
                match self {
                    $(Self::$name => $version,)*
                    $(Self::$optional => $optional_version,)*
                }
            }

            /// Returns whether a driver may lack this entry point.
            pub const fn is_optional(self) -> bool {
                matches!(self, $(Self::$optional)|*)
            }
        }

        impl DriverTable {
            /// Fills a table from `resolve`, which returns a non-null address or an error.
            ///
            /// # Safety
            /// Each returned address must be the requested function, with the header's signature.
            /// It must stay valid as long as the table or a copy of it is used.
            #[cfg(target_os = "linux")]
            pub(crate) unsafe fn resolve_with<E>(
                mut resolve: impl FnMut(DriverFunction) -> Result<core::ptr::NonNull<core::ffi::c_void>, E>,
            ) -> Result<Self, E> {
                Ok(Self {
                    // SAFETY: the caller guarantees that the address is this function. Data and
                    // function pointers have the same representation on every target with a CUDA
                    // driver.
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
    /// Returns the C name.
    pub fn name(self) -> &'static str {
        self.c_name().to_str().unwrap_or_default()
    }
}

impl core::fmt::Display for DriverFunction {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        formatter.write_str(self.name())
    }
}
