//go:build !sandboxtrap

package sandbox

import "golang.org/x/sys/unix"

// fallback is for calls that are on no list. To the program the kernel looks
// like one from before they came, which Go's libraries know how to live with.
var fallback = refuse(unix.ENOSYS)
