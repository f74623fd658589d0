# Sourced by deepspeed.sh, openmpi.sh and slurm.sh: the virtual environment, and what the hosts must know.
#
# An environment that is active already is used as it is; else the checkout's own is made (launch/setup_env.sh). It must
# be found at the same path on every host, as the checkout itself: in a shared folder, or as copies.

if [ -z "${VIRTUAL_ENV:-}" ]; then
    source launch/setup_env.sh
fi

# host_names HOSTFILE: the hosts in it, one a line.
host_names() {
    awk '!/^[[:space:]]*#/ && NF { print $1 }' "$1"
}

# variables: the names of what ranks on other hosts get of this shell's environment, one a line.
#
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network interface between the hosts (ip -brief address shows them).
#                                            gloo takes the address that the host's own name stands for, often 127.0.1.1.
#   CUDA_MODULE_LOADING, CUDA_DEVICE_MAX_CONNECTIONS, PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF)
#                                            not all of CUDA_: CUDA_VISIBLE_DEVICES is each host's own.
variables() {
    compgen -e | grep -E '^((PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CUDA_HOME|CUDA_MODULE_LOADING|CUDA_DEVICE_MAX_CONNECTIONS|PYTORCH_(CUDA_)?ALLOC_CONF|OMP_NUM_THREADS|XDG_CACHE_HOME)$|DS_|GLOO_|NCCL_|TORCH_|HF_|WANDB_)' |
        grep -vx 'DS_ENV_FILE'
}

# check_hosts HOSTFILE: says which host can't run a rank, and why.
check_hosts() {
    local host problem failed=0
    for host in $(host_names "$1"); do
        problem=$(ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" \
            "cd '$PWD' && '$(command -v python)' -c 'import ds_vshape'" 2>&1) && continue
        echo "$host: $problem" >&2
        failed=1
    done
    if [ "$failed" = 1 ]; then
        echo "Each host of $1 needs a login by ssh without a password, and $PWD and $VIRTUAL_ENV at these paths." >&2
        return 1
    fi
}
