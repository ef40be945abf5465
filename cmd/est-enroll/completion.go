package main

import (
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// offered are the words that a flag can be, where they are few.
func offered(f *pflag.Flag) []string {
	if which, ok := f.Value.(*oneOf); ok {
		return which.allowed
	}
	if f.Name == "block-size" {
		return []string{"16", "32", "64", "128", "256", "512", "1024"}
	}
	return nil
}

// completeFlags says of each flag of the commands what a shell can offer: the words
// of a setting of a few, files, directories, or nothing. It is for a shell that asks
// alone: every other run would wait a millisecond for it.
func completeFlags(commands []*cobra.Command) {
	for _, command := range commands {
		command.InheritedFlags().SortFlags = false // as the root shows them
		command.Flags().VisitAll(func(f *pflag.Flag) {
			words, directive := offered(f), cobra.ShellCompDirectiveNoFileComp
			switch kind, _ := pflag.UnquoteUsage(f); kind {
			case "file":
				directive = cobra.ShellCompDirectiveDefault
			case "directory":
				directive = cobra.ShellCompDirectiveFilterDirs
			}
			// It fails for the root's flags, which are each command's, after the first.
			_ = command.RegisterFlagCompletionFunc(f.Name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
				return slices.Clone(words), directive
			})
		})
	}
}
