// Command hone is a local OpenAI-compatible model server that also fine-tunes.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/hone-llm/hone/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
