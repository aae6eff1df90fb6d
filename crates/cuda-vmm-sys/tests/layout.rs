//! Compares the layout of all types in Rust with the C compiler's view of the header: for this
//! crate as it is built, and for the hand-written declarations. The test writes, compiles and runs
//! a C program, the witness. It needs a C compiler (`cc`, or the one in the variable `CC`) and
//! CUDA's headers, which it finds as the build script does.

#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

#[macro_use]
#[path = "../src/names.rs"]
mod names;

#[path = "../build/places.rs"]
#[allow(dead_code)]
mod places;

#[allow(dead_code, unreachable_pub)]
#[path = "../src/declarations.rs"]
mod declarations;

macro_rules! names_of_types {
    ($($type:ident,)*) => { &[$(stringify!($type)),*] };
}
macro_rules! names_of_constants {
    ($($name:ident: $type:ident = $value:literal;)*) => { &[$(stringify!($name)),*] };
}
macro_rules! names_of_handles {
    ($($pointer:ident = $pointee:ident;)*) => { &[$(stringify!($pointer)),*] };
}
const TYPES: &[&str] = types!(names_of_types);
const HANDLES: &[&str] = handles!(names_of_handles);
const CONSTANTS: &[&str] = constants!(names_of_constants);

/// Fields: the structure, and the field's names in C and in Rust.
macro_rules! fields {
    ($callback:ident) => {
        $callback! {
            CUmemLocation: "type" = type_, "id" = id;
            CUmemAllocationProp:
                "type" = type_, "requestedHandleTypes" = requestedHandleTypes, "location" = location,
                "win32HandleMetaData" = win32HandleMetaData, "allocFlags" = allocFlags,
                "allocFlags.compressionType" = allocFlags.compressionType,
                "allocFlags.gpuDirectRDMACapable" = allocFlags.gpuDirectRDMACapable,
                "allocFlags.usage" = allocFlags.usage, "allocFlags.reserved" = allocFlags.reserved;
            CUmemAccessDesc: "location" = location, "flags" = flags;
            CUuuid: "bytes" = bytes;
        }
    };
}
macro_rules! names_of_fields {
    ($($struct:ident: $($c_field:literal = $field:ident $(. $inner:ident)?),*;)*) => {
        &[$($((stringify!($struct), $c_field)),*),*]
    };
}
const FIELDS: &[(&str, &str)] = fields!(names_of_fields);

/// Returns the C compiler's values, by name.
fn witness() -> &'static BTreeMap<String, u64> {
    static WITNESS: OnceLock<BTreeMap<String, u64>> = OnceLock::new();
    WITNESS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let set_up: Vec<_> = folder
            .ancestors()
            .map(|folder| folder.join("cuda-vmm-setup"))
            .filter(|folder| folder.is_dir())
            .collect();
        let include = places::search(&places::places(|name| std::env::var_os(name), &set_up))
            .unwrap_or_else(|message| panic!("{message}"))
            .include;

        let mut rows = String::new();
        let mut row = |name: &str, value: &str| {
            writeln!(rows, "    printf(\"{name}\\t%llu\\n\", (unsigned long long)({value}));").unwrap();
        };
        for name in TYPES.iter().chain(HANDLES) {
            row(&format!("size {name}"), &format!("sizeof({name})"));
            row(&format!("align {name}"), &format!("_Alignof({name})"));
        }
        for (name, field) in FIELDS {
            row(&format!("offset {name}.{field}"), &format!("offsetof({name}, {field})"));
        }
        for name in CONSTANTS {
            row(&format!("value {name}"), name);
        }
        // Headers differ, and so do builds with and without bindgen. Each uses its own file.
        let (source, program) = (
            folder.join(format!("witness-{}.c", std::process::id())),
            folder.join(format!("witness-{}", std::process::id())),
        );
        let text = format!(
            "#include <stddef.h>\n#include <stdio.h>\n#include <cuda.h>\n\nint main(void)\n{{\n{rows}    return 0;\n}}\n"
        );
        std::fs::write(&source, text).unwrap();
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let mut words = compiler.split_whitespace();
        let status = Command::new(words.next().unwrap_or("cc"))
            .args(words)
            .args(["-std=c11", "-I"])
            .arg(&include)
            .arg("-o")
            .args([&program, &source])
            .status()
            .unwrap_or_else(|error| panic!("the C compiler {compiler} could not be started: {error}"));
        assert!(status.success(), "{compiler} {}: {status}", source.display());
        let output = Command::new(&program).output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        std::fs::remove_file(&source).unwrap();
        std::fs::remove_file(&program).unwrap();
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| {
                let (name, value) = line.split_once('\t').unwrap();
                (name.to_owned(), value.parse().unwrap())
            })
            .collect()
    })
}

/// Lists Rust's value of every row, from the module `rust` in scope.
macro_rules! sizes {
    ($($type:ident,)*) => {
        vec![$(
            (format!("size {}", stringify!($type)), size_of::<rust::$type>() as u64),
            (format!("align {}", stringify!($type)), align_of::<rust::$type>() as u64),
        )*]
    };
}
macro_rules! sizes_of_handles {
    ($($pointer:ident = $pointee:ident;)*) => { sizes!($($pointer,)*) };
}
macro_rules! offsets {
    ($($struct:ident: $($c_field:literal = $field:ident $(. $inner:ident)?),*;)*) => {
        vec![$($(
            (format!("offset {}.{}", stringify!($struct), $c_field),
             core::mem::offset_of!(rust::$struct, $field $(. $inner)?) as u64),
        )*)*]
    };
}
macro_rules! values {
    ($($name:ident: $type:ident = $value:literal;)*) => {
        vec![$((format!("value {}", stringify!($name)), u64::from(rust::$name)),)*]
    };
}

/// Compares these rows with the witness's. Both must have the same rows.
fn compare(rows: [Vec<(String, u64)>; 4]) {
    let rows: BTreeMap<String, u64> = rows.into_iter().flatten().collect();
    assert_eq!(rows.len(), witness().len());
    let differing: Vec<_> = rows
        .iter()
        .filter(|(name, value)| witness().get(*name) != Some(*value))
        .map(|(name, value)| format!("{name}: Rust {value}, C {:?}", witness().get(name)))
        .collect();
    assert!(differing.is_empty(), "{differing:#?}");
}

#[test]
fn the_crate_as_it_is_built_agrees_with_the_header() {
    use cuda_vmm_sys as rust;
    compare([
        types!(sizes),
        handles!(sizes_of_handles),
        fields!(offsets),
        constants!(values),
    ]);
}

#[test]
fn hand_written_declarations_agree_with_the_header() {
    use crate::declarations as rust;
    compare([
        types!(sizes),
        handles!(sizes_of_handles),
        fields!(offsets),
        constants!(values),
    ]);
}
