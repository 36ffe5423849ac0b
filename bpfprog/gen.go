package bpfprog

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bpfprog -target bpfel -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -nostdinc" -type grm_meta -type flow_bucket steer c/steer.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -go-package bpfprog -target bpfel -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -nostdinc" -type grm_socket hooks c/hooks.bpf.c
