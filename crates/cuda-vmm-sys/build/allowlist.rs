//! The types and constants that bindgen generates: those that the table's calls use. `src/names.rs`
//! has their names, and `src/functions.rs` those of function-pointer types.

macro_rules! names_of_types {
    ($($type:ident,)*) => { &[$(stringify!($type)),*] };
}
macro_rules! names_of_handles {
    ($($pointer:ident = $pointee:ident;)*) => { &[$(stringify!($pointer)),*] };
}

const TYPES: &[&str] = types!(names_of_types);
const HANDLES: &[&str] = handles!(names_of_handles);

/// Function-pointer types that older headers lack.
const OPTIONAL: &[&str] = &["PFN_cuCtxRecordEvent_v12050"];

/// All types by name. bindgen adds the types of their fields and arguments.
pub fn types() -> impl Iterator<Item = &'static str> {
    let functions = include_str!("../src/functions.rs")
        .split(|character: char| !character.is_ascii_alphanumeric() && character != '_')
        .filter(|word| word.starts_with("PFN_cu") && !OPTIONAL.contains(word));
    let named = TYPES.iter().chain(HANDLES).copied();
    named
        .chain(["CUhostFn", "PFN_cuGetProcAddress_v11030"])
        .chain(functions)
}
