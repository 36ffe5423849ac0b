package main

import "grm/bpfprog/cbpf"

// cookie2 is the shortest dissector there is: the cookie is the payload's
// first two bytes.
var cookie2 = mustParse(`
	{ 0x28, 0, 0, 0 },  // ldh [0]
	{ 0x16, 0, 0, 0 },  // ret a
`)

// cookie20 is the same after checks such as a protocol's header needs: six
// loads, arithmetic, scratch memory and three jumps. All but the last
// instruction are executed.
var cookie20 = mustParse(`
	{ 0x30, 0, 0, 2 },           // ldb [2]
	{ 0x54, 0, 0, 0xf0 },        // and #0xf0
	{ 0x15, 0, 16, 0x40 },       // jne #0x40, refuse
	{ 0x02, 0, 0, 0 },           // st M[0]
	{ 0x28, 0, 0, 4 },           // ldh [4]
	{ 0x64, 0, 0, 8 },           // lsh #8
	{ 0x02, 0, 0, 1 },           // st M[1]
	{ 0x30, 0, 0, 6 },           // ldb [6]
	{ 0x07, 0, 0, 0 },           // tax
	{ 0x60, 0, 0, 1 },           // ld M[1]
	{ 0x4c, 0, 0, 0 },           // or x
	{ 0x02, 0, 0, 1 },           // st M[1]
	{ 0x20, 0, 0, 8 },           // ld [8]
	{ 0x25, 0, 5, 0x10 },        // jle #0x10, refuse
	{ 0x30, 0, 0, 12 },          // ldb [12]
	{ 0x45, 3, 0, 1 },           // jset #1, refuse
	{ 0x60, 0, 0, 0 },           // ld M[0]
	{ 0x28, 0, 0, 0 },           // ldh [0]
	{ 0x16, 0, 0, 0 },           // ret a
	{ 0x06, 0, 0, 0xffffffff },  // refuse: ret #-1
`)

func mustParse(text string) cbpf.Program {
	p, err := cbpf.Parse([]byte(text))
	if err == nil {
		err = cbpf.Check(p)
	}
	if err != nil {
		panic(err) // a constant of this file
	}
	return p
}
