//! How many packages a user of ours gets, and whether they have become more.

use crate::display;
use crate::workspace::Workspace;
use anyhow::{Result, ensure};

/// Other systems get others.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const RECORDED: &str = "xtask/consumers/packages.csv";

/// Counts what each user gets: the crate itself, and what only the build needs among them. Prints it
/// beside what is recorded, and fails if one differs. A change that adds one records the new number.
pub fn check(workspace: &Workspace) -> Result<()> {
    let (mut rows, mut differing) = (Vec::new(), Vec::new());
    for line in workspace.shell.read_file(RECORDED)?.lines().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let [user, package, recorded] = fields[..] else {
            anyhow::bail!("{RECORDED} has no three fields in {line:?}");
        };
        let arguments = format!("--format {{p}} --target {TARGET} --package {package}");
        let count = workspace.tree(&arguments)?.len().to_string();
        if count != recorded {
            differing.push(format!("{user}: {count}"));
        }
        rows.push([user.to_owned(), count, recorded.to_owned()]);
    }
    println!("{}", display::table("user of,packages,recorded", rows));
    let differing = differing.join(", ");
    ensure!(
        differing.is_empty(),
        "if this is meant, write it to {RECORDED}: {differing}"
    );
    Ok(())
}
