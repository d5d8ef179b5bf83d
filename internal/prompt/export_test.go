package prompt

import (
	"context"

	"github.com/hone-llm/hone/internal/wire"
)

// Render is the rendering without tokenization, with or without the generation prompt.
func Render(b *Builder, ctx context.Context, messages []wire.Message, generationPrompt bool) (string, error) {
	return b.render(ctx, messages, generationPrompt)
}
