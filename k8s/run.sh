#!/bin/sh
# Run the stages of an overlay, one Job after the other: k8s/run.sh OVERLAY [STAGE...]
#
# OVERLAY       a folder of k8s/overlays, such as local or h100, or the path of one of your own
# STAGE...      the stages to run (default: all that the overlay's job file has)
# KUBECTL       the kubectl to use, with its options (default: kubectl)
# POLL_SECONDS  how often a Job is looked at (default: 5)
#
# Jobs of an earlier run are deleted first, since a Job cannot be changed. Nothing is lost by that:
# artifacts and checkpoints lie on the volume, so what is sealed is skipped and what was stopped goes on.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kubectl=${KUBECTL:-kubectl}
namespace=untaxed
if [ $# -eq 0 ]; then
    echo "k8s/run.sh: no overlay; wanted one of $(ls "$here/overlays" | tr '\n' ' ')" >&2
    exit 64
fi
overlay=$1
shift
if [ -d "$here/overlays/$overlay" ]; then overlay=$here/overlays/$overlay; fi
if [ ! -f "$overlay/kustomization.yaml" ]; then
    echo "k8s/run.sh: $overlay has no kustomization.yaml; wanted one of $(ls "$here/overlays" | tr '\n' ' ')" >&2
    exit 64
fi

# The job file lies outside the overlay's folder, which kustomize allows only when asked to.
objects=$($kubectl kustomize --load-restrictor LoadRestrictionsNone "$overlay")
if [ $# -eq 0 ]; then
    set -- prep
    if printf '%s\n' "$objects" | grep -q '^    anchor:'; then set -- "$@" anchor; fi
    set -- "$@" pack sft
    if printf '%s\n' "$objects" | grep -q '^    choose:'; then set -- "$@" choose; fi
    set -- "$@" merge baseline eval
fi

$kubectl --namespace "$namespace" delete job --selector app.kubernetes.io/name=untaxed --ignore-not-found
printf '%s\n' "$objects" | $kubectl apply --filename -

for stage; do
    echo "k8s/run.sh: $stage"
    $kubectl --namespace "$namespace" patch job "$stage" --type merge --patch '{"spec": {"suspend": false}}'
    while :; do
        state=$($kubectl --namespace "$namespace" get job "$stage" \
            --output 'jsonpath={.status.conditions[?(@.status=="True")].type}')
        case " $state " in
        *" Complete "*) break ;;
        *" Failed "*)
            $kubectl --namespace "$namespace" logs "job/$stage" --tail 20 >&2 || true
            reason=$($kubectl --namespace "$namespace" get job "$stage" \
                --output 'jsonpath={.status.conditions[?(@.type=="Failed")].message}')
            echo "k8s/run.sh: $stage failed: ${reason:-no reason given}; mend it and run the same command" >&2
            exit 1
            ;;
        esac
        sleep "${POLL_SECONDS:-5}"
    done
done
echo "k8s/run.sh: all stages complete"
