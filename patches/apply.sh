#!/usr/bin/env bash
# Applies or reverts the MoBA patch in a Megatron-LM checkout; picks the patch by the checkout's version.
set -euo pipefail

usage() {
    cat <<TEXT
usage: patches/apply.sh [--check | --dry-run | --revert] MEGATRON_LM

  (no option)  apply the patch that fits the checkout MEGATRON_LM
  --check      say whether it is applied, can be applied, or neither; changes nothing (status 0, 0, 1)
  --dry-run    say what would be changed; changes nothing
  --revert     take the patch out again (with --dry-run: say what would be)
TEXT
}

fail() { echo "error: $*" >&2; exit 1; }

action=apply dry_run=0 checkout=
while (($#)); do
    case $1 in
        --check) action=check ;;
        --dry-run) dry_run=1 ;;
        --revert) action=revert ;;
        -h | --help) usage; exit 0 ;;
        -*) usage >&2; fail "unknown option $1" ;;
        *) [[ -z $checkout ]] || fail "one checkout at a time, got $checkout and $1"; checkout=$1 ;;
    esac
    shift
done
[[ -n $checkout ]] || { usage >&2; exit 2; }
command -v git >/dev/null || fail "git is not installed: it applies the patch"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
info=$checkout/megatron/core/package_info.py
[[ -f $info ]] || fail "$checkout is no Megatron-LM checkout: it has no megatron/core/package_info.py"
[[ -f $checkout/megatron/training/arguments.py ]] || fail "$checkout is no Megatron-LM checkout: no megatron/training"

number() { sed -nE "s/^$1 *= *([0-9]+).*/\1/p" "$info" | head -n 1; }
version=$(number MAJOR).$(number MINOR)
case $version in
    0.13 | 0.14 | 0.15 | 0.16 | 0.17 | 0.18 | 0.19) patch=$here/megatron-lm-$version.patch ;;
    0.20) patch=$here/megatron-lm-main.patch ;;
    *) patch=$here/megatron-lm-main.patch
       echo "warning: Megatron-LM $version is not a version that was checked (0.13 to 0.20); trying main's patch" >&2 ;;
esac
patch_name=patches/$(basename "$patch")

# A checkout without .git works too; with one above it, git apply would skip files outside of that repository's index.
try() { (cd "$checkout" && GIT_CEILING_DIRECTORIES=$(cd .. && pwd) git apply --check "$@" "$patch" 2>&1); }
change() { (cd "$checkout" && GIT_CEILING_DIRECTORIES=$(cd .. && pwd) git apply "$@" "$patch"); }
files() { sed -n 's|^+++ b/|    |p' "$patch"; }

if try --reverse >/dev/null; then state="applied"
elif problem=$(try); then state="not applied, and fits"
else state="not applied, and does not fit"
fi

echo "Megatron-LM $version in $checkout: $patch_name is $state"
if [[ $state == *"does not fit" ]]; then
    echo "$problem" >&2
    fail "another version, or these lines were changed." \
        "Without a patch: python -m moba_megatron.launch $checkout/pretrain_gpt.py"
fi
[[ $action != check ]] || exit 0
if [[ $action == apply && $state == applied || $action == revert && $state != applied ]]; then
    echo "nothing to do"
    exit 0
fi
reverse=()
[[ $action != revert ]] || reverse=(--reverse)
if ((dry_run)); then
    echo "would $action $patch_name, which changes"
    files
    exit 0
fi
change ${reverse[@]+"${reverse[@]}"}
[[ $action == apply ]] && echo "applied; changed" || echo "reverted; changed"
files
