package bpfprog

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// clock tells how the kernel's jiffies become the monotonic clock: how long
// one is, and what they were when that clock began. They began at 300 s before
// 2^32; a machine that boots slowly has missed some.
func clock() (tick uint32, zero uint64, err error) {
	var res unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res); err != nil {
		return 0, 0, fmt.Errorf("clock_getres: %w", err)
	}
	ns := res.Nano()
	if ns <= 0 || ns > 100e6 {
		return 0, 0, fmt.Errorf("the coarse clock's resolution is %d ns: not one of a kernel's tick", ns)
	}
	begin := int64(1)<<32 - 300*(1e9/ns)
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "clock", Type: ebpf.SocketFilter, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{
			asm.FnKtimeGetNs.Call(),
			asm.Mov.Reg(asm.R6, asm.R0),
			asm.FnJiffies64.Call(),
			asm.LoadImm(asm.R1, begin, asm.DWord),
			asm.Sub.Reg(asm.R0, asm.R1),
			asm.Mul.Imm(asm.R0, int32(ns)),
			asm.Sub.Reg(asm.R0, asm.R6),
			asm.ArSh.Imm(asm.R0, 20), // about milliseconds, so that it fits the result
			asm.Return(),
		},
	})
	if err != nil {
		return 0, 0, fmt.Errorf("compare clocks: %w", explain(err))
	}
	defer p.Close()
	ahead, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil {
		return 0, 0, fmt.Errorf("compare clocks: %w", err)
	}
	return uint32(ns), uint64(begin + int64(int32(ahead))<<20/ns), nil
}
