package main

import "golang.org/x/sys/unix"

// sysFstatat goes by another name on each architecture.
const sysFstatat = unix.SYS_NEWFSTATAT
