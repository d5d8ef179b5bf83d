// Package faults injects faults into the real binary and writes what came of them to docs/faults.md: `make test-faults`.
//
// Everything is in its tests, which have the build tag faults, because they take many minutes: each function proves the rows
// of one kind of fault. They see of hone what its users do: processes, files and HTTP.
package faults
