"""Speed, memory and accuracy of pissa_hub beside what else there is; see README.md here."""
