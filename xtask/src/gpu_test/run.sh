#!/bin/sh
# Runs this bundle's tests on the GPU of this machine, and writes report.md.
# The report goes to $OUT if that is set, else beside this script. Needs tar, and no toolchain.
# Exit code: 0 every row PASS; 1 a row FAIL; 2 no row FAIL, but some SKIPPED; 64 wrong usage.
set -u

if [ $# -ne 0 ]; then
    echo "usage: $0    (no arguments; OUT=FOLDER chooses where report.md goes)" >&2
    exit 64
fi
here=$(cd "$(dirname "$0")" && pwd) || exit 1
out=${OUT:-$here}
mkdir -p "$out" || exit 1
report=$out/report.md
row_seconds=${ROW_SECONDS:-300}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
: >"$report" || exit 1
tar -xzf "$here/bundle.tar.gz" -C "$work" || exit 1
mkdir "$work/logs" "$work/opened" || exit 1

# Only the real driver counts here.
CUDA_VMM_TEST_DRIVER=real
export CUDA_VMM_TEST_DRIVER
unset CUDA_VMM_DRIVER_PATH

answer=$("$work/bin/probe" 2>&1)
probe=$?
value() { printf '%s\n' "$answer" | sed -n "s/^$1=//p" | head -n 1; }
reason=$(value reason)
gpu=$(value name)
devices=$(value devices)
cuda=$(value cuda)
driver=
if [ "$probe" -eq 0 ] && command -v nvidia-smi >/dev/null 2>&1; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
fi

# The folders that hold the CUDA libraries which the Candle rows are linked to.
candidates() {
    printf '%s\n' "${LD_LIBRARY_PATH:-}" | tr ':' '\n'
    for folder in /usr/local/cuda/lib64 /usr/local/cuda/targets/*/lib /usr/local/cuda-*/lib64; do
        printf '%s\n' "$folder"
    done
    if command -v python3 >/dev/null 2>&1; then
        python3 -c '
import glob, os, site, sys
folders = list(sys.path) + site.getsitepackages() + [site.getusersitepackages()]
for folder in dict.fromkeys(folders):
    for library in sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib"))):
        print(library)
' 2>/dev/null
    fi
}
candidates >"$work/candidates"
loader() {
    { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | sed -n 's/^[[:space:]]*\([^ ]*\) .*/\1/p'
}
loader >"$work/loader"
libraries=
missing=
while read -r library; do
    found=
    while read -r folder; do
        if [ -n "$folder" ] && [ -e "$folder/$library" ]; then
            found=$folder
            break
        fi
    done <"$work/candidates"
    if [ -n "$found" ]; then
        case ":$libraries:" in
        *":$found:"*) ;;
        *) libraries=${libraries:+$libraries:}$found ;;
        esac
    elif ! grep -qxF "$library" "$work/loader"; then
        missing=${missing:+$missing, }$library
    fi
done <"$work/libraries"

passes=0
failures=0
skips=0
reals=0
table=$work/table
: >"$table"

# record STATE NAME SECONDS TESTS DRIVER NOTE
record() {
    case $1 in
    PASS) passes=$((passes + 1)) ;;
    FAIL) failures=$((failures + 1)) ;;
    SKIPPED) skips=$((skips + 1)) ;;
    esac
    printf '%-8s %-32s %5s s  %5s tests  driver: %-9s  %s\n' "$1" "$2" "$3" "$4" "$5" "$6"
    printf '| %s | %s | %s | %s | %s | %s |\n' "$2" "$1" "$3" "$4" "$5" "$6" >>"$table"
}

# The sum of the numbers before a word ("passed") in the runner's summary lines.
total() {
    sed -n "s/^test result:.* \([0-9][0-9]*\) $1;.*/\1/p" "$2" | {
        sum=0
        while read -r number; do sum=$((sum + number)); done
        echo "$sum"
    }
}

limited() {
    if command -v timeout >/dev/null 2>&1; then
        timeout -k 10 "$row_seconds" "$@"
    else
        "$@"
    fi
}

number=0
while IFS='	' read -r kind file name; do
    number=$((number + 1))
    if [ "$probe" -eq 2 ]; then
        record SKIPPED "$name" 0 0 none "$reason"
        continue
    fi
    if [ "$probe" -ne 0 ]; then
        record FAIL "$name" 0 0 none "${reason:-the probe did not answer}"
        continue
    fi
    if [ "$kind" = candle ] && [ -n "$missing" ]; then
        record SKIPPED "$name" 0 0 none "missing $missing"
        continue
    fi
    log=$work/logs/$number
    began=$(date +%s)
    (
        cd "$work" || exit 1
        if [ "$kind" = candle ] && [ -n "$libraries" ]; then
            LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
            export LD_LIBRARY_PATH
        fi
        # The dynamic loader writes down what each process opens.
        LD_DEBUG=files LD_DEBUG_OUTPUT=$work/opened/$number
        export LD_DEBUG LD_DEBUG_OUTPUT
        limited "./bin/$file" </dev/null
    ) >"$log" 2>&1
    code=$?
    took=$(($(date +%s) - began))
    passed=$(total passed "$log")
    failed=$(total failed "$log")
    # Tests that are about the simulator never open the driver, wherever they run.
    opened=simulated
    if cat "$work/opened/$number".* 2>/dev/null | grep -q 'calling init:.*libcuda\.so\.1'; then
        opened=real
        reals=$((reals + 1))
    fi
    note=
    state=PASS
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        state=FAIL
        note="stopped after $took s (exit code $code)"
    elif [ "$code" -ne 0 ]; then
        state=FAIL
        note="exit code $code, $failed tests failed"
    elif [ "$kind" != program ] && [ "$passed" -eq 0 ]; then
        state=FAIL
        note="no test ran"
    elif [ "$kind" != core ] && [ "$opened" != real ]; then
        state=FAIL
        note="it did not open the real driver"
    fi
    record "$state" "$name" "$took" "$passed" "$opened" "$note"
    if [ "$state" = FAIL ]; then
        {
            printf '\n## Log of %s\n\n```text\n' "$name"
            cat "$log"
            printf '```\n'
        } >>"$work/appendix"
    elif [ "$kind" = program ]; then
        {
            printf '\n## Output of %s\n\n```text\n' "$name"
            tail -n 80 "$log"
            printf '```\n'
        } >>"$work/appendix"
    fi
done <"$work/rows"

{
    echo "# GPU test report"
    echo
    echo "| | |"
    echo "|---|---|"
    echo "| GPU | ${gpu:-none} |"
    echo "| GPUs | ${devices:-0} |"
    echo "| Driver | ${driver:-not known} |"
    echo "| CUDA version of the driver | ${cuda:-none} |"
    echo "| Kernel | $(uname -sr) |"
    echo "| Date | $(date -u '+%Y-%m-%d %H:%M UTC') |"
    echo "| Command | \`$0\` |"
    sed 's/^\([^:]*\): \(.*\)$/| \1 | \2 |/' "$work/built"
    echo "| CUDA libraries | ${libraries:-those of the dynamic loader}${missing:+; missing: $missing} |"
    echo
    echo "$passes PASS, $failures FAIL, $skips SKIPPED; $reals rows opened the real driver"
    echo
    echo "Driver: whether the row's processes opened libcuda.so.1. Tests that are about the simulator do not."
    echo
    echo "| Row | State | Seconds | Tests passed | Driver | Note |"
    echo "|---|---|---:|---:|---|---|"
    cat "$table"
    if [ -f "$work/appendix" ]; then cat "$work/appendix"; fi
} >"$report"

echo "$passes PASS, $failures FAIL, $skips SKIPPED; $reals rows opened the real driver; GPU: ${gpu:-none}; report: $report"
if [ "$failures" -gt 0 ]; then exit 1; fi
if [ "$skips" -gt 0 ]; then exit 2; fi
if [ "$reals" -eq 0 ]; then exit 1; fi
exit 0
